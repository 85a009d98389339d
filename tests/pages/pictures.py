"""Draw the pictures of the READMEs: python tests/pages/pictures.py

The maps are drawn from the arithmetic of ranks, the rest from results.json, which benchmark.py
writes. White ground, so that they are readable on dark pages and on paper; no colour carries a
meaning that a word, a place or a line style does not carry too.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

RESULTS = Path(__file__).with_name("results.json")
ROOT = RESULTS.parents[2]
INK, BLUE, LIGHT, ORANGE, GREY = "#222222", "#2166ac", "#d8e6f3", "#f4c58f", "#eeeeee"
plt.rcParams |= {"svg.hashsalt": "fixed", "svg.fonttype": "none", "font.size": 10}
plt.rcParams |= {"font.family": "sans-serif", "savefig.facecolor": "white"}


def canvas(width, height):
    """Return axes in which a unit is an inch and nothing is drawn."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def box(axes, x, y, width, height, text="", color="white", edge=INK, size=9):
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.05")
    shape.set(facecolor=color, edgecolor=edge, linewidth=1)
    axes.add_patch(shape)
    place = {"ha": "center", "va": "center", "fontsize": size, "color": INK}
    axes.text(x + width / 2, y + height / 2, text, **place)


def host(axes, x, y, name, ranks, launcher=None):
    """Draw a machine with its processes; return the middle of each process's lower edge."""
    count = len(ranks)
    height = 1.35 if launcher else 1.0
    box(axes, x, y, 1.15 * count + 0.1, height, color=GREY, edge="#999999")
    axes.text(x + 0.1, y + height - 0.17, name, fontsize=9, color=INK, va="center")
    if launcher:
        box(axes, x + 0.1, y + 0.72, 1.15 * count - 0.1, 0.28, launcher, ORANGE)
    for local_rank, rank in enumerate(ranks):
        left = x + 0.1 + 1.15 * local_rank
        box(axes, left, y + 0.1, 1.05, 0.45, f"rank {rank}\nGPU {local_rank}", LIGHT)
        if launcher:  # starts it
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1}
            axes.annotate("", (left + 0.52, y + 0.53), (left + 0.52, y + 0.74), arrowprops=arrow)
    return [(x + 0.62 + 1.15 * local_rank, y + 0.1) for local_rank in range(count)]


def two_hosts(axes, y, launchers):
    """Draw two machines that meet at a store, and average their gradients."""
    points = host(axes, 0.6, y, "node1", [0, 1], launchers[0])
    points += host(axes, 5.3, y, "node2", [2, 3], launchers[1])
    ring(axes, points, "all-reduce, over the network")
    box(axes, 3.45, y + 0.67, 1.4, 0.38, "store, on node1", ORANGE)
    arrow = {"arrowstyle": "<->", "color": "#b35806", "linewidth": 1.5, "linestyle": "--"}
    axes.annotate("", (2.9, y + 0.86), (3.45, y + 0.86), arrowprops=arrow)
    axes.annotate("", (4.85, y + 0.86), (5.4, y + 0.86), arrowprops=arrow)


def ring(axes, points, text):
    """Draw the line along which the ranks average their gradients."""
    y = points[0][1] - 0.27
    for x, bottom in points:
        arrow = {"arrowstyle": "<->", "color": BLUE, "linewidth": 1.5}
        axes.annotate("", (x, bottom), (x, y), arrowprops=arrow)
    axes.plot([points[0][0], points[-1][0]], [y, y], color=BLUE, linewidth=1.5)
    axes.text(points[-1][0] + 0.1, y, text, fontsize=9, color=BLUE, va="center")


def stages_map():
    axes = canvas(9.6, 10.15)

    def title(y, number, text):
        axes.text(0.15, y, number, fontsize=15, weight="bold", color=INK, va="center")
        axes.text(0.62, y, text, fontsize=10, color=INK, va="center")

    title(9.9, "01", "one process, started with python")
    host(axes, 0.6, 8.7, "one machine", [0])
    title(8.3, "02", "torchrun starts one process per GPU")
    points = host(axes, 0.6, 6.75, "one machine", [0, 1, 2, 3], "torchrun")
    ring(axes, points, "all-reduce: the gradients are averaged at each step")
    title(
        6.1,
        "03",
        "a torchrun on each machine; they meet at a store, and deal out the ranks",
    )
    two_hosts(axes, 4.55, ["torchrun", "torchrun"])
    title(3.9, "04", "the script is its own launcher: rank = node rank x 2 + local rank")
    two_hosts(axes, 2.35, ["train_llm.py --node-rank 0", "train_llm.py --node-rank 1"])
    title(
        1.75,
        "03",
        "sharded: each keeps a part; in two dimensions: a node's ranks share layers",
    )
    for node, x in enumerate((0.6, 5.3)):
        points = host(axes, x, 0.5, f"node{node + 1}", [2 * node, 2 * node + 1])
        ring(axes, points, "activations")
    axes.annotate("", (3.1, 1.0), (5.2, 1.0), arrowprops={"arrowstyle": "<->", "color": BLUE})
    axes.text(3.25, 1.12, "weights, gradients", fontsize=9, color=BLUE)
    return "map.svg"


def mesh():
    axes = canvas(9.4, 2.5)

    def matrix(x, name, parts):
        axes.text(x, 2.25, name, fontsize=9, va="center", color=INK)
        for left, bottom, width, height, rank in parts:
            color = LIGHT if rank % 2 else ORANGE  # the rank within its group
            box(axes, x + left, 0.2 + bottom, width, height, f"rank {rank}", color)

    rows = [(0, 1.35, 0), (0, 0.9, 2), (0, 0.45, 1), (0, 0, 3)]
    matrix(
        0.2,
        "q_proj: half of its heads, and\nof those rows a group's half",
        [(left, bottom, 1.8, 0.45, rank) for left, bottom, rank in rows],
    )
    squares = [(0, 0.9, 0), (0.9, 0.9, 1), (0, 0, 2), (0.9, 0, 3)]
    matrix(
        3.5,
        "o_proj: the columns of its\nheads, and half of their rows",
        [(left, bottom, 0.9, 0.9, rank) for left, bottom, rank in squares],
    )
    axes.text(
        6.8, 2.25, "a norm: both ranks of a\ngroup have the same half", fontsize=9, va="center"
    )
    box(axes, 6.8, 1.1, 1.8, 0.45, "ranks 0 and 1", GREY)
    box(axes, 6.8, 0.65, 1.8, 0.45, "ranks 2 and 3", GREY)
    return "03-multi-node/mesh.svg"


def ranks():
    axes = canvas(9.4, 2.9)
    lines = {"LOCAL_RANK": 1.62, "RANK": 1.32, "its GPU": 1.02}
    for name, y in lines.items():
        axes.text(0.15, y, name, fontsize=9, weight="bold", va="center", color=INK)
    axes.text(0.15, 0.45, "rows of a step\n(places in the\npermutation)", fontsize=9, va="center")
    for node in range(2):
        x = 1.5 + 4.0 * node
        box(axes, x, 0.1, 3.8, 2.7, color=GREY, edge="#999999")
        axes.text(x + 0.1, 2.6, f"node{node + 1}", fontsize=10, va="center", color=INK)
        box(axes, x + 0.1, 2.08, 3.6, 0.32, "torchrun --nproc-per-node 4", ORANGE)
        for local_rank in range(4):
            rank = 4 * node + local_rank
            left = x + 0.1 + 0.91 * local_rank
            box(axes, left, 0.2, 0.85, 1.75, color=LIGHT)
            for y, text in zip(
                (1.62, 1.32, 1.02, 0.45),
                (local_rank, rank, f"cuda:{local_rank}", f"{rank}, {rank + 8},\n{rank + 16}, ..."),
                strict=True,
            ):
                place = {"fontsize": 9, "ha": "center", "va": "center", "color": INK}
                axes.text(left + 0.425, y, text, **place)
    return "03-multi-node/ranks.svg"


def curves(found):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.5), layout="constrained")
    styles = [("-", 7, "#c6dbef"), ("-", 4, "#6baed6"), ("--", 2, "#08519c"), (":", 2, "#000000")]
    first = next(iter(found["runs"].values()))["loss"]
    for (name, run), (style, width, color) in zip(found["runs"].items(), styles, strict=False):
        left.plot(found["steps"], run["loss"], style, linewidth=width, color=color, label=name)
        if run["loss"] is not first:
            apart = [max(1e-9, abs(a - b) / a) for a, b in zip(first, run["loss"], strict=True)]
            marker, size = [("o", 9), ("s", 6), ("x", 4)][len(right.lines)]
            style = {"markersize": size, "markerfacecolor": "none", "color": color, "label": name}
            right.plot(found["steps"], apart, marker, **style)
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="four stages, one curve")
    left.legend(frameon=False)
    right.axhline(1e-4, color=INK, linewidth=1)
    right.text(200, 1.3e-4, "what the tests allow", ha="right", fontsize=9, color=INK)
    right.set(yscale="log", ylim=(3e-10, 1e-3), xlabel="step")
    right.set_yticks(
        [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4], ["equal", *map("1e{}".format, range(-8, -3))]
    )
    right.minorticks_off()
    right.set(title="difference from stage 01, relative")
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.84), fontsize=8)
    return "curves.svg"


def timeline(found):
    figure, axes = plt.subplots(figsize=(9.4, 3.0), layout="constrained")
    colors = {"data": "#aaaaaa", "forward": "#d8e6f3", "backward": "#9ecae1"}
    colors |= {"optimizer": "#dddddd", "all-reduce": ORANGE}
    for rank, spans in enumerate(found["ranks"]):
        computing, sending = -2.6 * rank, -2.6 * rank - 1
        axes.text(-0.02, computing, f"rank {rank} computes", ha="right", va="center", fontsize=9)
        axes.text(-0.02, sending, "all-reduce, buckets", ha="right", va="center", fontsize=9)
        buckets = 0
        for span in sorted(spans, key=lambda span: span["from"]):
            start, seconds = span["from"] / 1e6, (span["to"] - span["from"]) / 1e6
            bucket = span["name"] == "all-reduce"
            buckets += bucket
            y = sending + 0.22 * (-1) ** buckets if bucket else computing
            height = 0.4 if bucket else 0.8
            style = {"color": colors[span["name"]], "edgecolor": INK, "linewidth": 0.6}
            axes.barh(y, seconds, height, left=start, **style)
            name = buckets if bucket else span["name"]
            place = {"ha": "center", "va": "center", "fontsize": 8, "color": INK}
            if name in ("data", "optimizer"):  # too narrow: above it
                place |= {"va": "bottom"}
                y += 0.45
            axes.text(start + seconds / 2, y, name, **place)
    axes.set(yticks=[], xlabel="seconds", ylim=(-4.3, 1.0))
    axes.spines[["top", "right", "left"]].set_visible(False)
    return "02-multi-gpu/timeline.svg"


def links(found):
    figure, axes = plt.subplots(figsize=(9.4, 3.2), layout="constrained")
    for batch, style, color in ((8, "-", BLUE), (64, "--", "#b35806")):
        rows = [row for row in found["table"] if row["batch"] == batch]
        free = rows[0]["seconds"]
        bits = [10 ** (6.5 + i / 20) for i in range(71)]
        model = [free / (free + found["bytes"] * 8 / b) for b in bits]
        label = f"expected, global batch {batch}"
        axes.plot(bits, model, style, color=color, label=label)
        limited = [row for row in rows if row["bits"]]
        speeds = [free / row["seconds"] for row in limited]
        at = [row["bits"] for row in limited]
        axes.plot(at, speeds, "o" if batch == 8 else "s", color=color, label=f"measured, {batch}")
    axes.set(xscale="log", ylim=(0, 1.12), xlabel="link, bits per second")
    axes.axhline(1, color="#999999", linewidth=0.8)
    note = "above 1: the machine was faster in that run; a limit speeds nothing up"
    axes.text(3.3e6, 1.03, note, fontsize=8, color=INK)
    axes.set(ylabel="speed, of that without limit")
    axes.set_xticks([1e7, 1e8, 1e9, 1e10], ["10 M", "100 M", "1 G", "10 G"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return "03-multi-node/links.svg"


def main():
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sections = {curves: "curves", timeline: "timeline", links: "links"}
    for picture in (stages_map, ranks, mesh, curves, timeline, links):
        section = sections.get(picture)
        if section and section not in results:
            print(f"{section} was not measured: run python tests/pages/benchmark.py {section}")
            continue
        path = picture(results[section]) if section else picture()
        plt.savefig(ROOT / path, metadata={"Date": None})
        plt.close("all")
        print(path)


if __name__ == "__main__":
    main()
