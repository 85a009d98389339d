"""Write the parts of the READMEs that come from the code: python tests/update_readmes.py [--check]

A part stands between <!-- begin NAME --> and <!-- end NAME -->. --check writes nothing and exits
with 1 if a part is stale.
"""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def flags(folder):
    """Return what --help prints about the flags, with the defaults of a reader's machine."""
    line = [sys.executable, "train_llm.py", "--help"]
    env = os.environ | {"COLUMNS": "90"}
    text = subprocess.run(line, cwd=folder, env=env, check=True, capture_output=True, text=True)
    return f"```text\n{text.stdout.partition('options:')[2].strip(chr(10))}\n```"


def diff(folder):
    """Return the diff from the stage before."""
    stages = sorted(path.parent for path in ROOT.glob("*/train_llm.py"))
    before = stages[stages.index(folder) - 1]
    old, new = ((path / "train_llm.py").read_text().splitlines() for path in (before, folder))
    names = (f"{path.name}/train_llm.py" for path in (before, folder))
    return "\n".join(["```diff", *difflib.unified_diff(old, new, *names, lineterm="", n=1), "```"])


PARTS = {"flags": flags, "diff": diff}


def main():
    stale = []
    for readme in sorted(ROOT.glob("*/README.md")):
        old = readme.read_text()

        def part(match, folder=readme.parent):
            return f"{match[1]}\n{PARTS[match[2]](folder)}\n{match[3]}"

        new = re.sub(r"(<!-- begin (\w+) -->).*?(<!-- end \2 -->)", part, old, flags=re.DOTALL)
        if new != old:
            stale.append(str(readme.relative_to(ROOT)))
            if "--check" not in sys.argv:
                readme.write_text(new)
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}: run python tests/update_readmes.py")


if __name__ == "__main__":
    main()
