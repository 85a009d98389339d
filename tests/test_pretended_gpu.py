"""What can be said of the GPU path without a GPU: the scripts on pretended ones.

Shown: which device a tensor is on, what a collective is given, where random numbers come from, what
is saved and comes back, and where the CPU would wait. Not shown: kernels, NCCL, compilers, speed.
"""

import os
import re

import pytest
from lab.pretended import forked_with_gpus, on_gpus, waits_of, why_not
from lab.stages import (
    FOLDERS,
    ROOT,
    SCRIPTS,
    STEPS,
    command,
    metrics,
    run,
    run_forked,
    worst_difference,
)

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON)),
]
FP32 = ["--dtype", "fp32", "--no-compile"]
BF16 = ["--dtype", "bf16", "--no-compile"]


@pytest.fixture(scope="module", autouse=True)
def gpus():
    with forked_with_gpus():
        yield


def start(stage, *flags, ranks=None, script=None, env=None, **options):
    """Run a stage (or a changed copy of its script) in two micro-steps, from 02 on with 2 ranks."""
    ranks = ranks or (1 if stage == "01" else 2)
    words = command(stage, *flags, "-b", 4 // ranks, processes=ranks)[1:]
    words[words.index(str(SCRIPTS[stage]))] = script or SCRIPTS[stage]
    return run(words, 300, env or on_gpus(), forked=stage != "04", **options)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_float32_gives_the_curve_of_the_cpu(stage, flags, alone, tmp_path):
    """And nothing waits for the GPU between the head of the loop and its `continue`."""
    start(stage, *flags, *STEPS, *FP32, "-e", "run", env=on_gpus(tmp_path / "waits"))
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"{stage}: {difference:.1e}")
    assert difference < 1e-5
    assert_no_wait_in_the_loop(tmp_path / "waits", SCRIPTS[stage])


def assert_no_wait_in_the_loop(log, script):
    lines = script.read_text().splitlines()
    head = lines.index("    while step < total_steps:") + 1
    end = lines.index("            continue", head) + 1
    waits = waits_of(log, script)
    assert any("read" in what for what, _, _ in waits), "the log line is made of values"
    # Once, at the second forward pass, the ranks agree on the order of DDP's buckets.
    agreeing = [wait for wait in waits if wait[1] == "_pre_forward"]
    print(f"{len(agreeing)} waits inside DDP")
    for what, function, places in waits:
        in_loop = any(head <= line <= end for line in places)
        assert places and (not in_loop or function == "_pre_forward"), (what, function, places)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_killed_run_goes_on_with_the_same_numbers(stage, flags, dropout_model, tmp_path):
    flags = [*flags, *STEPS, *BF16, "-m", dropout_model]
    killed_and_resumed(stage, flags, tmp_path)
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run")) == 0


def killed_and_resumed(stage, flags, folder, **options):
    if stage == "04":
        options["ranks"] = 1  # its processes are new ones, which takes them a while
    start(stage, *flags, "-e", "whole", **options)
    (folder / "notes").mkdir()
    dies = on_gpus(RECORD=folder / "notes", DIE=1, ALONE=1)
    start(stage, *flags, "-e", "run", env=dies, fails=True, **options)
    start(stage, *flags, "-e", "run", **options)


def test_the_preflight_says_fit_to_train(tmp_path):
    text = (ROOT / FOLDERS["03"] / "check_cluster.py").read_text()
    script = tmp_path / "check_cluster.py"
    script.write_text(text.replace("8192", "256"))  # a product of matrices for a GPU
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script]
    done = run([*words, "--save-dir", tmp_path], 200, on_gpus())
    assert "fit to train: 2 ranks" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("pretended GPU") >= 2


def planted(tmp_path, stage, old, new):
    """Return a copy of a stage's script in which old has become new."""
    text = SCRIPTS[stage].read_text()
    assert text.count(old) == 1, old
    script = tmp_path / "outputs-beside" / "train_llm.py"
    script.parent.mkdir()
    script.write_text(text.replace(old, new))
    return script


def test_dropout_of_the_wrong_generator_is_found(flags, dropout_model, tmp_path):
    """No test on a CPU can see it."""
    script = planted(tmp_path, "01", "torch.cuda if on_gpu else torch ", "torch ")
    flags = [*flags, *STEPS, *BF16, "-m", dropout_model]
    killed_and_resumed("01", flags, tmp_path, script=script)
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run")) > 0


def test_a_value_that_is_read_at_every_step_is_found(flags, tmp_path):
    script = planted(tmp_path, "02", "loss_sum += loss.detach()", "loss_sum += loss.item()")
    log = tmp_path / "waits"
    start("02", *flags, *STEPS, *FP32, script=script, env=on_gpus(log))
    with pytest.raises(AssertionError, match="read"):
        assert_no_wait_in_the_loop(log, script)


STOP = "stop = torch.tensor(max(signals), device=device)"
PLANTED = {
    "a collective of a CPU tensor": (STOP, STOP.replace(", device=device", ""), "type cpu"),
    "a model left on the CPU": ("model.to(device).train()", "model.train()", "type cpu"),
    "a checkpoint on the GPU": ('map_location="cpu"', 'map_location="cuda"', "RNG state must be"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_on_the_wrong_device_is_found(flags, tmp_path, fault):
    old, new, found = PLANTED[fault]
    script = planted(tmp_path, "03", old, new)
    flags = [*flags, *STEPS, *FP32, "-e", "run"]
    if "checkpoint" in fault:
        start("03", *flags, "--max-steps", 8)
    done = start("03", *flags, script=script, fails=True)
    assert re.search(found, done.stderr), done.stderr


def test_the_rank_as_the_number_of_the_gpu_is_found(flags, tmp_path):
    """On the second node: rank 2 is its local rank 0."""
    device = 'torch.device("cuda", local_rank)'
    script = planted(tmp_path, "03", device, device.replace("local_", ""))
    place = {"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 4}
    done = run_forked(list(map(str, [script, *flags])), 100, on_gpus(**place))
    assert done.returncode and "invalid device ordinal" in done.stderr, done.stderr
