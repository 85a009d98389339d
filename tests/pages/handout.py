"""Make what a class gets before it writes a stage: handout.py 02 FOLDER

Also 03, 04, sharded or tp. FOLDER then has the repository without the script of that stage and of
the later ones, the pages without solutions and hunks, and of tests/ what the checker needs.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "02": "02-multi-gpu/train_llm.py",
    "03": "03-multi-node/train_llm.py",
    "04": "04-manual-spawn/train_llm.py",
    "sharded": "03-multi-node/train_llm_sharded.py",
    "tp": "03-multi-node/train_llm_2d.py",
}
NOT_FOR_THEM = (
    "TEACHING.md",
    ".ci/",
    ".github/",
    "tests/test_",
    "tests/conftest.py",
    "tests/pages/",
)
HIDDEN = r"<details><summary>(?!--help|Show them).*?</details>\n+|\n[^\n]*\(TEACHING\.md\)[^\n]*"

HANDOUT = """

*This is a handout: {} come later, so take your own scripts instead. The pages are without
hunks and solutions.*

"""


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in STAGES:
        sys.exit(__doc__)
    stage, folder = sys.argv[1], Path(sys.argv[2])
    if folder.exists():
        sys.exit(f"error: {folder} exists: delete it, or take another name")
    later = list(STAGES.values())[list(STAGES).index(stage) :]
    line = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if name in later or name.startswith(NOT_FOR_THEM):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
        if name.endswith(".md"):
            text = re.sub(HIDDEN, "", (ROOT / name).read_text(), flags=re.DOTALL)
            if name == "README.md":
                text = text.replace("\n\n", HANDOUT.format(", ".join(later)), 1)
            (folder / name).write_text(text)
    print(f"{folder}: for a class that writes {stage}")


if __name__ == "__main__":
    main()
