"""How the tests run a stage: as a reader does, in a process of its own."""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.run

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"01": "01-single-gpu", "02": "02-multi-gpu", "03": "03-multi-node"}
FOLDERS |= {"04": "04-manual-spawn"}
SHARDED = ROOT / FOLDERS["03"] / "train_llm_sharded.py"
TWO_D = ROOT / FOLDERS["03"] / "train_llm_2d.py"
SCRIPTS = {stage: ROOT / folder / "train_llm.py" for stage, folder in FOLDERS.items()}
SCRIPTS |= {"sharded": SHARDED}

# A short run of which every step is logged, and the 8th and 16th saved.
STEPS = ["--max-steps", 16, "--log-freq", 1, "--ckpt-freq", 8, "--global-batch-size", 8]


def command(stage, *flags, processes=None, torchrun=()):
    """Return the command line of a stage; processes: how many, through torchrun (not in 04)."""
    script = str(SCRIPTS[stage])
    launcher, more = [sys.executable], []
    if stage == "04":
        more = ["--nproc-per-node", str(processes or 1)]
    elif stage != "01":
        launcher += ["-m", "torch.distributed.run", *torchrun]
        launcher += [] if "--nnodes" in torchrun else ["--standalone"]
        launcher += ["--nproc-per-node", str(processes or 1)]
    return [*launcher, script, *map(str, flags), *more]


def environment(**extra):
    """Return the environment of a run; None takes a variable out.

    One thread per process: with more threads than cores OpenMP's waiting costs minutes. Without
    wandb, whose own processes cost seconds: the tests that look at it say WANDB_MODE=None. Without
    GPUs: the tests compare float32 losses, and run more processes than a machine may have GPUs.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_HUB_OFFLINE"))}
    env |= {"OMP_NUM_THREADS": "1", "HOME": os.environ.get("TEST_HOME", env["HOME"])}
    env |= {"PYTHONPATH": ROOT / "tests" / "lab" / "fewer_collections", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"WANDB_MODE": "disabled"} | extra
    return {key: str(value) for key, value in env.items() if value is not None}


def train(
    stage, *flags, processes=None, torchrun=(), env=None, fails=False, timeout=180, forked=True
):
    """Run a stage to its end. Return the finished process; assert that it succeeded (or failed).

    forked=False: in any case as a reader does, in new processes.
    """
    words = command(stage, *flags, processes=processes, torchrun=torchrun)[1:]
    forked = forked and stage != "04"
    return run(words, timeout, environment(**(env or {})), fails=fails, forked=forked)


def run(words, timeout, env, cwd=None, fails=False, forked=True):
    """Do `python WORDS` to its end, forked if it can be; return as train does."""
    words = list(map(str, words))
    changed = {name for name, _ in env.items() ^ environment().items()}
    if forked and all(name.startswith(READ_LATE) for name in changed):
        done = run_forked(words, timeout, env, cwd)
    else:
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        line = [sys.executable, *words]
        done = subprocess.run(line, env=env, cwd=cwd, timeout=timeout, **options)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


# Importing the libraries takes most of the tests' time. So a run is forked from a process that has
# imported them, and done nothing else, before: stage 01, or torchrun, which then forks its ranks.
# Not if it needs a variable that the libraries read while they are imported: these they do not.
# A sitecustomize.py on PYTHONPATH runs in torchrun, and what it has changed the ranks inherit.
READ_LATE = (
    "WANDB_",
    "RECORD",
    "ALONE",
    "DIE",
    "PYTHONPATH",
    "ONEDNN_",
    "PRETEND_",
    "WAITS",
)
LIBRARIES = ["torch._dynamo", "transformers.models.gpt2.modeling_gpt2", "datasets", "wandb"]
LIBRARIES += ["transformers.models.llama.modeling_llama"]
LIBRARIES += ["transformers.optimization", "transformers.models.auto.tokenization_auto"]
LIBRARIES += ["transformers.models.byt5.tokenization_byt5", "torch.distributed.run", "requests"]
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(LIBRARIES)


def fork(words, outputs=(os.devnull, os.devnull), env=None, cwd=None):
    """Start a script with its flags as `python SCRIPT FLAGS` would; return the process."""
    args = (words, env or environment(), outputs, cwd)
    process = forkserver.Process(target=be_python, args=args)
    process.start()
    return process


def run_forked(words, timeout, env=None, cwd=None):
    """Run a script with its flags; return the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = fork(words, outputs, env, cwd)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def be_python(words, env, outputs, cwd=None):
    """Do what `python WORDS` does once it has imported the libraries."""
    if cwd:
        os.chdir(cwd)
        multiprocessing.process.ORIGINAL_DIR = cwd  # where mp.spawn looks for the script
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    runpy.run_path(f"{env['PYTHONPATH']}/sitecustomize.py")
    try:
        if words[:2] == ["-m", "torch.distributed.run"]:
            sys.argv[:] = ["torchrun", "--run-path", "--start-method", "fork", *words[2:]]
            torch.distributed.run.main()
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def blocks_of(readme, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)


def smallest_script(directive, flags):
    """Return the smallest job script of job_scripts/README.md, for other flags of the training."""
    scripts = blocks_of("job_scripts/README.md", "sh")
    (script,) = [script for script in scripts if directive in script]
    assert script.count("-e smallest --max-steps 40") == 1
    return script.replace("-e smallest --max-steps 40", " ".join(map(str, flags)))


def apply(diff, script):
    """Return a script after the changes that a README shows, each under a line `@@ place`."""
    for part in re.split("^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        script = replaced(
            script, ["".join(x[1:] for x in lines if x[0] in " " + sign) for sign in "-+"]
        )
    return script


def replaced(text, *changes):
    """Return text with changes, each (old, new), of which old must stand there once."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def recorded(folder, **env):
    """Return an environment in which the ranks note in folder what they do: see recorder/.

    ALONE=1: the process is no rank. DIE=1: rank 0 kills itself once it has written a checkpoint.
    """
    folder.mkdir(exist_ok=True)
    return environment(PYTHONPATH=ROOT / "tests" / "checker" / "recorder", RECORD=folder, **env)


def notes_of(folder, ranks):
    """Return what each rank has noted, in the order of the ranks."""
    paths = [folder / f"{rank}.jsonl" for rank in range(ranks)]
    return [
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in paths
    ]


def rows_read(notes):
    """Return the rows that a rank has trained on, in order."""
    return [row for note in notes for row in note.get("rows", [])]


def error_line(done):
    """Return the one line that says what was wrong; there must be one, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert lines, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[0]


def metrics(run_dir):
    """Return {step: row} of a run; no step may be there twice, nor out of order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), steps
    return {row["step"]: row for row in rows}


def worst_difference(one, other, keys=("loss", "grad_norm", "val_loss")):
    """Return the largest relative difference of two runs' metrics, over all logged steps."""
    assert one.keys() == other.keys()
    worst = 0.0
    for step in one:
        for key in keys:
            if key in one[step]:
                a, b = one[step][key], other[step][key]
                worst = max(worst, abs(a - b) / abs(a))
    return worst


def weights(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]


def same_weights(one, other):
    """Are the final weights of two runs equal, bit for bit?"""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def processes_with(variable):
    """Return the ids of the processes that were started with NAME=VALUE in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found
