"""What the READMEs say is what happens: their commands run, their generated parts are fresh."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from check_exercise import ALL
from lab.stages import (
    FOLDERS,
    ROOT,
    SCRIPTS,
    SHARDED,
    STEPS,
    TWO_D,
    apply,
    blocks_of,
    environment,
    metrics,
    run,
    worst_difference,
)
from pages.update_readmes import scripts_of

RUN = "torch.distributed.run"  # what torchrun starts
READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])


def commands():
    """Yield (README, line) for each command in a bash block; the set-up lines are CI's own."""
    for readme in READMES:
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removesuffix(" &")
                if ".py" in line and not re.search("pip install|pkill", line):
                    yield pytest.param(readme, line, id=f"{readme.parent.name}: {line}"[:90])


def words_of(line):
    """Return the environment and the script's arguments of a command line."""
    words = shlex.split(line)
    if words[0] == "ssh":
        words = shlex.split(words[-1].split("&& ")[-1])
    env = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return env, words[:at], words[at], words[at + 1 :]


def parse(script, arguments):
    """Hand arguments to the real argument parser of script."""
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [str(script), *arguments]
    try:
        return module.parse_args()
    finally:
        sys.argv = before


@pytest.mark.parametrize("readme, line", list(commands()))
def test_every_command_runs_or_at_least_parses(readme, line, corpus, tmp_path):
    env, launcher, script, arguments = words_of(line)
    home = tmp_path / "home"
    shutil.copytree(corpus / "text", home / "my-texts")
    arguments = [word.replace("~", str(home)) for word in arguments]
    mine = script.startswith("my_")  # what the reader writes has the flags of the stage
    if mine:
        script = "train_llm_sharded.py" if readme.name == "sharding.md" else "train_llm.py"
    if f"as `{script}`" in readme.read_text():
        return  # the page has it, and a test of its own runs it
    path = (readme.parent / script).resolve()
    assert path.is_file(), f"{readme}: no such script: {script}"
    several = mine or "--nnodes" in [*launcher, *arguments] or "srun" in launcher or "RANK" in env
    if path.name == "check_cluster.py" or several:
        parse(path, arguments)  # other hosts or ranks are needed: the stage's own tests have them
        return
    if not path.name.startswith("train_llm"):
        subprocess.run([sys.executable, path, *arguments], cwd=readme.parent, check=True)
        return
    args = parse(path, arguments)
    if "gpu" in launcher or args.model_name:
        return  # a GPU or the hub is needed: parsing is all we can do
    if args.dataset_name and not Path(args.dataset_name).exists():
        return
    if args.experiment_name and path.parent.name != "01-single-gpu":
        return  # the same but for its name: the first command of the README has run
    steps = "10" if "--profile" in arguments else "2"
    more = ["--max-steps", steps, "--save-dir", tmp_path / "outputs"]
    programs = {"python": [], "torchrun": ["-m", RUN]}
    words = [*programs[launcher[0]], *launcher[1:], script, *arguments, *more]
    run(words, 200, environment(WANDB_MODE=None, **env), readme.parent)


def test_commands_inside_the_text_parse():
    found = 0
    for readme in READMES:
        text = re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)
        for line in re.findall(r"`([^`]*train_llm\.py [^`]*)`", text):
            line = " ".join(line.split())
            if "..." not in line and re.match(r"(python|torchrun|[A-Z_]+=)", line):
                _, _, script, arguments = words_of(line)
                path = readme.parent / script
                if path.name == "train_llm.py" and path.is_file():
                    parse(path, arguments)
                    found += 1
    assert found > 4, found


def test_the_smallest_ddp_program_averages_the_gradients(tmp_path):
    program = blocks_of("02-multi-gpu/README.md", "python")[0]
    (tmp_path / "ddp.py").write_text(program)
    words = ["-m", RUN, "--standalone", "--nproc-per-node", 2, "ddp.py"]
    printed = run(words, 100, environment(), tmp_path).stdout
    # not by lines: the ranks' may run together
    form = r"rank (\d): row \[\[(\S+), \S+\]\], gradient \[\[(\S+), \S+\]\], weights (\[\[.*?\]\])"
    one, other = sorted(re.findall(form, printed))
    assert one[:3] == ("0", "1.0", "1.5") and other[:3] == ("1", "2.0", "1.5"), printed
    assert one[3] == other[3]
    (said,) = (
        block for block in blocks_of("02-multi-gpu/README.md", "text") if "gradient [[" in block
    )
    assert len(re.findall(form, said)) == 2


def test_the_lines_that_matter_make_stage_02_of_stage_01(flags, alone, tmp_path):
    script = (ROOT / FOLDERS["01"] / "train_llm.py").read_text()
    (diff,) = [diff for diff in blocks_of("02-multi-gpu/README.md", "diff") if "@@ main" in diff]
    script = apply(diff, script)
    (tmp_path / "my_train_llm.py").write_text(script)
    line = ["-m", RUN, "--standalone", "--nproc-per-node", 2, "my_train_llm.py"]
    words = [*line, *flags, *STEPS, "-b", 2, "-e", "run"]
    run(words, 200, environment(), tmp_path)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4


def test_answers_on_paper_are_what_their_program_prints(capsys):
    answers = 0
    for readme in READMES:
        form = r"(?:On paper|In GB:).*?```python\n(.*?)```\n\n```text\n(.*?)```"
        for program, answer in re.findall(form, readme.read_text(), re.DOTALL):
            exec(program, {})
            assert capsys.readouterr().out == answer, readme
            answers += 1
    assert answers == 7


@pytest.mark.parametrize("page", [page for page in READMES if "begin hunks" in page.read_text()])
def test_the_hunks_of_a_page_make_its_script(page, tmp_path):
    form = r"<!-- begin hunks: [^\n]* -->\n```diff\n(.*?)```\n<!-- end hunks -->"
    hunks = re.findall(form, page.read_text(), re.DOTALL)
    script, before = scripts_of(page)
    mine = shutil.copy(before, tmp_path)
    subprocess.run(["patch", mine], input="".join(hunks), text=True, check=True)
    assert Path(mine).read_text() == script.read_text()


def words_in(text, also_code=True):
    """Return how many words a reader has before him: without diffs, and what makes folds."""
    hidden = r"```diff\n.*?```|<!--.*?-->|</?(details|summary)>" + (
        "" if also_code else "|```.*?```"
    )
    return len(re.sub(hidden, "", text, flags=re.DOTALL).split())


def test_pages_are_short_enough():
    pages = {readme: readme.read_text() for readme in READMES}
    words = {readme: words_in(text) for readme, text in pages.items()}
    for readme, number in words.items():
        assert number <= 3000, f"{readme}: {number} words"
        reading, _, exercises = pages[readme].partition("## Exercises")
        if exercises and readme.parent.name in FOLDERS.values():
            prose = words_in(reading, also_code=False)
            assert prose <= 1200, f"{readme}: {prose} words of prose before the exercises"
    learners = (text for readme, text in pages.items() if readme.name != "TEACHING.md")
    prose = sum(words_in(text, also_code=False) for text in learners)
    assert prose <= 17000, prose


def minutes_of(readme):
    """Return {number: minutes} of a page's exercises."""
    found = re.findall(r"^\*\*(\d+)\. [^*]*\*\* \(([^)]*)\)", readme.read_text(), re.MULTILINE)
    return {int(number): sum(map(int, re.findall(r"(\d+) minutes", how))) for number, how in found}


def test_the_minutes_of_a_class_add_up():
    pages = {"job_scripts": "job_scripts/README.md", "sharding": "03-multi-node/sharding.md"}
    pages["two_dimensions"] = "03-multi-node/two_dimensions.md"
    pages |= {stage: f"{folder}/README.md" for stage, folder in FOLDERS.items()}
    text, shares = (ROOT / "TEACHING.md").read_text(), []
    for hours, plan in re.findall(r"\*\*(\w+) hours\*\*\n\n(.*?)\n\n", text, re.DOTALL):
        rows = [row.strip("| ").split(" | ") for row in plan.splitlines()[2:]]
        assert (
            sum(int(minutes) for minutes, _ in rows)
            == 60 * {"Two": 2, "Four": 4, "Eight": 8}[hours]
        )
        for minutes, what in rows:
            exact = re.fullmatch(r"exercises? ([\d, and]+) of (\w+)", what)
            if exact:
                known = minutes_of(ROOT / pages[exact[2]])
                assert sum(known[int(n)] for n in re.findall(r"\d+", exact[1])) == int(minutes), (
                    what
                )
        theirs = sum(int(m) for m, what in rows if "xercise" in what)
        shares.append(
            round(100 * theirs / sum(int(m) for m, w in rows if w not in ("break", "lunch")))
        )
    assert "Exercises are {}, {} and {} % of the time".format(*shares) in text
    (tonight,) = re.findall(
        r"\| minutes \| do \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert sum(map(int, re.findall(r"^\| (\d+) \|", tonight, re.MULTILINE))) == 180


def test_pages_give_the_checker_s_own_counts():
    for stage in ("02", "03", "04"):
        text = (ROOT / FOLDERS[stage] / "README.md").read_text()
        counts = re.findall(r"all (\d+) (?:checks )?hold|all (\d+) checks", text)
        assert {int(one or other) for one, other in counts} == {ALL[stage]}, stage
    text = (ROOT / FOLDERS["02"] / "README.md").read_text()
    ((tried, more),) = re.findall(r"\d+ of (\d+) do not hold; (\d+) more", text)
    assert int(tried) + int(more) == ALL["02"]
    assert f"the first part holds, all {ALL['ddp'] - 1};" in text


def test_the_handout_has_no_solutions(tmp_path):
    line = [sys.executable, ROOT / "tests" / "pages" / "handout.py", "03"]
    subprocess.run([*line, tmp_path / "handout"], check=True)
    texts = {path: path.read_text() for path in tmp_path.rglob("*.md")}
    assert len(texts) > 8
    for path, text in texts.items():
        assert "```diff\n@@" not in text and "olution</summary>" not in text, path
        assert "nswer</summary>" not in text and "see, and why" not in text, path
    scripts = {str(path.relative_to(tmp_path / "handout")) for path in tmp_path.rglob("train_llm*")}
    assert scripts == {"01-single-gpu/train_llm.py", "02-multi-gpu/train_llm.py"}
    again = subprocess.run([*line, tmp_path / "handout"], capture_output=True, text=True)
    assert again.returncode == 1 and "exists: delete it" in again.stderr
    mine = shutil.copy(SCRIPTS["02"], tmp_path / "handout" / "my_multi_gpu.py")
    checker = [sys.executable, tmp_path / "handout" / "tests" / "check_exercise.py", "02", mine]
    done = subprocess.run(checker, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "all 17 hold" in done.stdout, done.stdout + done.stderr


def test_the_table_of_lines_is_that_of_the_scripts():
    before, scripts = None, {folder: SCRIPTS[stage] for stage, folder in FOLDERS.items()}
    scripts |= {"03, sharded": SHARDED, "03, in two dimensions": TWO_D}
    for name, script in scripts.items():
        cells = f"| {len(script.read_text().splitlines())} |"
        before = SCRIPTS["03"] if script == SHARDED else before
        if before:
            line = ["git", "diff", "--no-index", "--numstat", before, script]
            counts = subprocess.run(line, capture_output=True, text=True).stdout.split()
            cells += f" {counts[0]} + {counts[1]}"
        rows = (ROOT / "README.md").read_text().splitlines()
        assert any(row.startswith(f"| [{name}]") and cells in row for row in rows), (
            f"{name}: {cells}"
        )
        before = script


def test_what_the_smallest_job_scripts_lack_is_in_the_others():
    page, folder = (ROOT / "job_scripts/README.md").read_text(), ROOT / "job_scripts"
    for smallest, names in {
        "smallest.sbatch": ["multinode_torchrun.sbatch"],
        "smallest.pbs": ["multinode_torchrun.pbs", "pbs_hosts.sh"],
    }.items():
        scripts = "".join((folder / name).read_text() for name in names)
        table = re.search(rf"\| `{smallest}` does not .*?\n\n", page, re.DOTALL)[0]
        pieces = [
            code for row in table.strip().splitlines()[2:] for code in row.split("|")[2].split("`")
        ]
        assert len(pieces) > 15 and all(code in scripts for code in pieces[1::2]), smallest


def test_pictures_are_shown_and_say_what_is_on_them():
    for readme in READMES:
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", readme.read_text()):
            assert len(words) > 60, f"{readme}: {target} needs a text for who cannot see it"
    shown = "".join(readme.read_text() for readme in READMES)
    for picture in [*ROOT.glob("*.svg"), *ROOT.glob("*/*.svg")]:
        assert f"{picture.name})" in shown, f"{picture} is in no README"


def test_the_set_up_lines_are_the_ones_that_ci_runs():
    page = (ROOT / "README.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("pip install")]
    assert lines == [
        "pip install -r requirements.txt && python 01-single-gpu/train_llm.py",
        "pip install -r tests/requirements.txt && pytest",
    ]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_generated_parts_are_fresh():
    line = [sys.executable, ROOT / "tests" / "pages" / "update_readmes.py", "--check"]
    subprocess.run(line, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def anchors(readme):
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", readme.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_links_between_files_resolve():
    for readme in READMES:
        for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
            target, _, anchor = link.partition("#")
            if not target.startswith("http"):
                path = readme.parent / target if target else readme
                assert path.exists(), f"{readme}: {link}"
                assert not anchor or anchor in anchors(path), f"{readme}: {link}"
