"""Write the parts of the READMEs that come from the code: update_readmes.py [--check]

A part stands between <!-- begin NAME --> and <!-- end NAME -->, or begins with NAME: ARGUMENT.
--check writes nothing and exits with 1 if a part is stale.
"""

import contextlib
import difflib
import io
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def scripts_of(page):
    """Return a page's script, and the one it is told as a change of (None for stage 01)."""
    stages = sorted(ROOT.glob("*/train_llm.py"))
    sharded = ROOT / "03-multi-node" / "train_llm_sharded.py"
    if page.name == "sharding.md":
        return sharded, page.parent / "train_llm.py"
    if page.name == "two_dimensions.md":
        return page.parent / "train_llm_2d.py", sharded
    at = stages.index(page.parent / "train_llm.py")
    return stages[at], stages[at - 1] if at else None


def help_of(script):
    """Return what --help says of each flag, with the defaults of a reader's machine."""
    source = script.read_text()
    source = source.replace("Path(__file__).resolve().parents[1]", 'Path("..")')  # on any machine
    text = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="90"),
        mock.patch.object(sys, "argv", ["train_llm.py", "--help"]),
        contextlib.redirect_stdout(text),
    ):
        try:  # here and not in a new process: the imports take long
            exec(source, {"__name__": "__main__"})
        except SystemExit as end:
            assert not end.code, f"{script}: --help has failed"
    listed = text.getvalue().partition("options:")[2].strip("\n")
    return re.split(r"\n(?=  -)", listed)


def flags(page, _):
    """Return what --help says of the flags that the stage before does not have."""
    script, before = scripts_of(page)
    known = help_of(before) if before else []
    new = [flag for flag in help_of(script) if flag not in known]
    return "\n".join(["```text", *new, "```"])


def hunks(page, last):
    """Return the hunks after those of the marker before, up to the first that contains `last`.

    The hunks of a page, one after the other, are its whole diff.
    """
    new, old = scripts_of(page)
    texts = [path.read_text().splitlines() for path in (old, new)]
    _, _, *lines = difflib.unified_diff(*texts, lineterm="", n=1)
    rest = re.split(r"\n(?=@@ )", "\n".join(lines))
    for name in re.findall(r"<!-- begin hunks: (.*) -->", page.read_text()):
        at = next((at for at, hunk in enumerate(rest) if name in hunk), None)
        assert at is not None, f"{page}: no hunk that is left has {name!r} in it"
        part, rest = rest[: at + 1], rest[at + 1 :]
        if name == last:
            shown = part
    assert not rest, f"{page}: these hunks have no place: {rest}"
    return "\n".join(["```diff", *shown, "```"])


def measured(section):
    """Return a section of results.json, and a line that says how and where it was measured."""
    results = ROOT / "tests" / "pages" / "results.json"
    found = json.loads(results.read_text()).get(section) if results.exists() else None
    if found is None:
        sys.exit(f"error: {results} has no {section}: run benchmark.py {section}")
    at = found["where"]
    device = f"{at['cores']} cores of {at['cpu']}" + (f", {at['gpu']}" if "gpu" in at else "")
    versions = f"torch {at['torch']}, transformers {at['transformers']}, Python {at['python']}"
    command = found["command"].replace("tests/", "../tests/")
    return found, f"(`{command}`; {device}; {versions}; commit {at['commit']}.)"


CHECKPOINT = {
    "model": "you start over",
    "optimizer": "AdamW's averages start at zero: the loss jumps",
    "scheduler": "the learning rate warms up again",
    "step": "the same rows come again, others never",
    "rng": "dropout draws other numbers: it is not the same run any more",
    "rng_of": "random states of another device or number of ranks would be taken for one's own",
    "total_steps": "the log cannot say that the schedule has been stretched",
    "flags": "you resume with another seed or other data (which it identifies), and never notice",
    "metrics_size": "`metrics.jsonl` shows steps twice: on a resume it is cut to this size",
}


def checkpoint(page, _):
    found, line = measured("saving")
    lines = ["| in `checkpoint.pt` | size | without it |", "|---|---|---|"]
    for name, text in CHECKPOINT.items():
        size = found["bytes"][name]
        shown = f"{size / 1e6:.1f} MB" if size > 1e5 else f"{size:,} bytes"
        lines.append(f"| `{name}` | {shown} | {text} |")
    assert CHECKPOINT.keys() == found["bytes"].keys(), found["bytes"]
    return "\n".join([*lines, "", line])


PARTS = {"flags": flags, "hunks": hunks, "checkpoint": checkpoint}


def main():
    stale = []
    for readme in sorted(ROOT.glob("*/*.md")):
        old = readme.read_text()

        def part(match, page=readme):
            begin, name, argument, end = match.groups()
            return f"{begin}\n{PARTS[name](page, argument)}\n{end}"

        marked = r"(<!-- begin (\w+)(?:: ([^\n]*))? -->).*?(<!-- end \2 -->)"
        new = re.sub(marked, part, old, flags=re.DOTALL)
        if new != old:
            stale.append(str(readme.relative_to(ROOT)))
            if "--check" not in sys.argv:
                readme.write_text(new)
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}: run python tests/pages/update_readmes.py")


if __name__ == "__main__":
    main()
