"""Draw 02-multi-gpu/curves.svg from real runs: python tests/plot_curves.py

Stage 01 alone and stage 02 with 2 processes, the same flags and global batch, all cores each.
Prints the comparison that stage 02's README shows.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from stages import ROOT, command, environment, metrics, worst_difference

STEPS = 200


def run(folder, stage, processes, threads):
    flags = ["-e", stage, "--save-dir", folder, "-b", 8 // processes, "--global-batch-size", 8]
    line = command(stage, *flags, "--max-steps", STEPS, processes=processes)
    env = environment(OMP_NUM_THREADS=threads, WANDB_MODE=None)
    subprocess.run(line, env=env, check=True, stdout=subprocess.DEVNULL)
    return metrics(Path(folder) / stage)


def main():
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        alone = run(folder, "01", 1, cores)
        two = run(folder, "02", 2, max(1, cores // 2))
    for key in ("loss", "val_loss", "grad_norm"):
        print(f"largest relative difference in {key}: {worst_difference(alone, two, [key]):.1e}")
    print("step   stage 01   stage 02")
    for step in (10, 50, 100, 200):
        print(f"{step:>4}   {alone[step]['loss']:.6f}   {two[step]['loss']:.6f}")

    plt.rcParams |= {"svg.hashsalt": "fixed", "font.size": 11, "savefig.facecolor": "white"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = ("stage 01, 1 process", "stage 02, 2 processes")
    for rows, name, style in zip((alone, two), names, ("-", "--"), strict=True):
        width = 5 if style == "-" else 2
        color = "#9ecae1" if style == "-" else "#08306b"
        for axes, key in ((left, "loss"), (right, "tokens_per_s")):
            values = [row[key] for row in rows.values()]
            axes.plot(list(rows), values, style, linewidth=width, color=color, label=name)
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="the same losses")
    right.set(xlabel="step", ylabel="tokens/s", title=f"speed on {cores} CPU cores", ylim=(0, None))
    left.legend(frameon=False)
    target = ROOT / "02-multi-gpu" / "curves.svg"
    figure.savefig(target, metadata={"Date": None})
    print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
