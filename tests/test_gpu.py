"""What only a GPU can say. On a machine that has some: pytest tests/test_gpu.py

Everywhere else these tests are skipped, and the others hide the GPUs: they compare float32 losses,
and run more processes than a machine may have GPUs.
"""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from lab.material import make_model
from lab.stages import (
    FOLDERS,
    ROOT,
    STEPS,
    environment,
    metrics,
    recorded,
    train,
    worst_difference,
)

COUNT = torch.cuda.device_count()  # asks NVML: nothing that a forked process could not use is made
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(COUNT))))
EXACT = ["--dtype", "fp32", "--no-compile"]  # as on the CPU
pytestmark = pytest.mark.skipif(COUNT == 0, reason="no GPU")


def first_gpus(count):
    return {"CUDA_VISIBLE_DEVICES": ",".join(VISIBLE.split(",")[:count])}


def on_gpus(stage, *flags, processes=None, env=None, **options):
    """Run a stage on GPUs, one process each."""
    env = (env or {}) | first_gpus(processes or 1)
    return train(stage, *flags, processes=processes, env=env, forked=False, **options)


def visible_to(processes, line):
    """Run a command line that may use so many GPUs; return the finished process."""
    env = environment(**first_gpus(processes))
    return subprocess.run(map(str, line), env=env, capture_output=True, text=True, timeout=300)


def test_float32_gives_the_curve_of_the_cpu(flags, alone, tmp_path):
    on_gpus("01", *flags, *STEPS, *EXACT, "-e", "run")
    worst = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"GPU against CPU: {worst:.1e}")
    assert worst < 1e-3


def test_bf16_and_compile_train(flags, alone, tmp_path):
    done = on_gpus("01", *flags, *STEPS, "--dtype", "bf16", "--compile", "-e", "run")
    assert ", bf16 on cuda" in done.stderr
    exact, mine = metrics(alone), metrics(tmp_path / "run")
    assert all(math.isclose(mine[step]["loss"], exact[step]["loss"], rel_tol=0.05) for step in mine)
    assert mine[16]["loss"] < mine[1]["loss"]


@pytest.mark.parametrize("stage", ["02", "03", "04"])
@pytest.mark.parametrize("processes", sorted({1, COUNT}))
def test_nccl_gives_the_losses_of_stage_01(flags, tmp_path, stage, processes):
    on_gpus("01", *flags, *STEPS, *EXACT, "-e", "one")
    if 8 % processes:
        pytest.skip(f"a global batch of 8 on {processes} GPUs")
    flags = [*flags, *STEPS, *EXACT, "-b", 8 // processes]
    on_gpus(stage, *flags, "-e", "run", processes=processes)
    assert worst_difference(metrics(tmp_path / "one"), metrics(tmp_path / "run")) < 1e-4


@pytest.mark.parametrize("processes", sorted({1, COUNT}))
def test_sharded_is_unsharded(flags, alone, tmp_path, processes):
    if 8 % processes:
        pytest.skip(f"a global batch of 8 on {processes} GPUs")
    on_gpus(
        "sharded", *flags, *STEPS, *EXACT, "-b", 8 // processes, "-e", "run", processes=processes
    )
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-3


@pytest.mark.parametrize("stage, processes", [("01", None), ("02", COUNT)])
def test_a_killed_run_goes_on_with_its_dropout(flags, dropout_model, tmp_path, stage, processes):
    if processes and 8 % processes:
        pytest.skip(f"a global batch of 8 on {processes} GPUs")
    flags = [*flags, *STEPS, *EXACT, "-m", dropout_model, "-b", 8 // (processes or 1)]
    on_gpus(stage, *flags, "-e", "whole", processes=processes)
    env = recorded(tmp_path / "notes", DIE=1, ALONE=1)
    on_gpus(stage, *flags, "-e", "run", processes=processes, env=env, fails=True)
    on_gpus(stage, *flags, "-e", "run", processes=processes)
    worst = worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run"))
    print(f"resumed: {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.parametrize("order", ["GPU, CPU", "CPU, GPU"])
def test_a_run_moves_between_gpu_and_cpu(flags, alone, tmp_path, order):
    for steps, place in zip((8, 16), order.split(", "), strict=True):
        more = [*STEPS, *EXACT, "--max-steps", 16, "-e", "run"]
        env = recorded(tmp_path / f"notes{steps}", ALONE=1, **({"DIE": 1} if steps == 8 else {}))
        if place == "CPU":
            train("01", *flags, *more, env=env, fails=steps == 8)
        else:
            on_gpus("01", *flags, *more, env=env, fails=steps == 8)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-3


def test_too_little_memory_says_so(flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.set_per_process_memory_fraction(0.001)\n"
    )
    wide = make_model(tmp_path / "wide", dropout=0.0, width=1024)
    flags = [*flags, *STEPS, "-m", wide, "-b", 512, "--global-batch-size", 512]
    done = on_gpus("01", *flags, env={"PYTHONPATH": tmp_path}, fails=True)
    assert "OutOfMemoryError: CUDA out of memory" in done.stderr.splitlines()[-1]


def test_profile_shows_kernels(flags, tmp_path):
    on_gpus("01", *flags, *STEPS, "-e", "run", "--profile")
    (path,) = (tmp_path / "run").glob("*.json*")
    with gzip.open(path) if path.suffix == ".gz" else open(path) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no nvidia-smi")
def test_the_preflight_sees_the_gpus():
    script = ROOT / FOLDERS["03"] / "check_cluster.py"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = visible_to(COUNT, [*line, "--nproc-per-node", COUNT, script])
    assert done.returncode == 0 and f"fit to train: {COUNT} ranks" in done.stdout, done.stderr
