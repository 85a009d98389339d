"""The checker of the exercises accepts the stages, and catches and names each planted mistake."""

import os
import socket
import subprocess
import sys

import pytest
from check_exercise import ALL, check, check_device, prepare, processes_with, reference
from hosts import wait_for, why_not
from stages import FOLDERS, ROOT, environment

REASON = why_not()
STAGE_03 = pytest.param(
    "03",
    marks=pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON)),
)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    flags = prepare(folder)
    return flags, reference(flags, folder)


def results_of(stage, script, right, tmp_path):
    """Return {what: mistake} as the checker says it; outputs go to tmp_path."""
    flags, curve_and_rows = right
    return dict(
        check(stage, script, [*flags, "--save-dir", tmp_path / "outputs"], curve_and_rows, tmp_path)
    )


def changed(stage, old, new, tmp_path):
    """Return a reader's script: the stage's own, with one change."""
    source = (ROOT / FOLDERS[stage] / "train_llm.py").read_text()
    assert source.count(old) == 1
    script = tmp_path / "my_train_llm.py"
    script.write_text(source.replace(old, new))
    return script


@pytest.mark.parametrize("stage", ["02", STAGE_03, "04"])
def test_the_stages_hold(right, tmp_path, stage):
    results = results_of(stage, ROOT / FOLDERS[stage] / "train_llm.py", right, tmp_path)
    assert len(results) == ALL and not any(results.values()), results


DISTRIBUTED = "sampler = DistributedSampler(train_data, "
DEVICES = "torch.cuda.set_device(device)"
MISTAKES = {
    "every rank has all data": (DISTRIBUTED, DISTRIBUTED + "1, 0, ", "reads the same data"),
    "no set_epoch": ("        sampler.set_epoch(epoch)", "        0", "sampler.set_epoch(epoch)"),
    "the model instead of DDP's": ("else ddp_model", "else model", "not averaged over the ranks"),
    "always no_sync": (
        "if micro_step % micro_steps else nullcontext():",
        ":",
        "stand outside no_sync()",
    ),
    "the loss of one rank": (
        "dist.all_reduce(losses)  # the sum over the ranks\n                losses /= world_size",
        "",
        "the loss is that of one rank",
    ),
    "the sum of the losses": ("losses /= world_size", "", "without dividing by their number"),
    "accumulation not scaled": ("loss = loss / micro_steps", "", "accumulation is scaled wrongly"),
    "scheduler per micro-batch": (
        "if micro_step % micro_steps != 0:\n",
        "if micro_step % micro_steps != 0:\n                scheduler.step()\n",
        "the learning rate is wrong from step",
    ),
    "validation of one rank": ("    dist.all_reduce(loss_sum)\n", "", "val_loss is wrong"),
    "all ranks save": (
        "                    if rank == 0:\n                        save_checkpoint",
        "                    if True:\n                        save_checkpoint",
        "2 ranks do",
    ),
    "all ranks log": (
        "if run_dir and dist.get_rank() == 0:",
        "if run_dir:",
        "every rank writes metrics.jsonl",
    ),
    "all on the first GPU": (
        "torch.cuda.set_device(rank)",
        "torch.cuda.set_device(0)",
        "local rank 1 takes GPU 0",
    ),
    "an epoch anew after a resume": (
        "indices[position // world_size : epoch_samples",
        "indices[: epoch_samples",
        "rows again that it has had",
    ),
    "scheduler not restored": (
        'scheduler.load_state_dict(checkpoint["scheduler"])',
        "0",
        "is the scheduler restored?",
    ),
    "optimizer not restored": (
        'optimizer.load_state_dict(checkpoint["optimizer"])',
        "0",
        "are weights and optimizer both restored",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(right, tmp_path, mistake):
    old, new, message = MISTAKES[mistake]
    script = changed("02", old, new, tmp_path)
    wrong = [text for text in results_of("02", script, right, tmp_path).values() if text]
    assert wrong and message in wrong[0], wrong


def test_a_device_by_the_rank_is_named(right, tmp_path):
    """In stage 03, where the local rank is not the rank."""
    old = 'torch.device("cuda", 0 if alone else local_rank)'
    new = 'torch.device("cuda", rank % torch.cuda.device_count())'
    script = changed("03", old, new, tmp_path)
    ((what, wrong),) = check_device("03", script, right[0], tmp_path)
    assert "local rank 1 takes GPU 0" in wrong and "rank % device_count" in wrong


def test_a_script_that_does_not_start_is_shown_with_what_it_said(tmp_path):
    script = tmp_path / "my_train_llm.py"
    script.write_text("import torch\nraise ValueError('not ready yet')\n")
    line = [sys.executable, ROOT / "tests" / "check_exercise.py", "02", script]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: not ready yet" in done.stdout and "WRONG  it trains" in done.stdout


def test_without_no_sync_all_holds(right, tmp_path):
    """It costs time, and changes nothing."""
    old = "ddp_model.no_sync() if micro_step % micro_steps else nullcontext()"
    script = changed("02", old, "nullcontext()", tmp_path)
    results = results_of("02", script, right, tmp_path)
    assert len(results) == ALL and not any(results.values()), results


def test_two_ranks_with_one_number(right, tmp_path):
    """Stage 04's exercise: the second one cannot serve the store, the first one waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}
    env = environment(LOCAL_WORLD_SIZE=2, LOCAL_RANK=0, **env)
    line = [sys.executable, ROOT / FOLDERS["03"] / "train_llm.py", *map(str, right[0])]
    runs = [subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        wait_for(lambda: any(run.poll() is not None for run in runs), what="one fails")
        ended = [run for run in runs if run.poll() is not None]
        assert len(ended) == 1
        assert ended[0].returncode == 1 and "EADDRINUSE" in ended[0].stderr.read()
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def test_without_end_with_the_parent_the_ranks_train_on(right, tmp_path):
    script = changed("04", "    end_with_the_parent()\n", "", tmp_path)
    flags = [*right[0], "--max-steps", 100_000, "--save-dir", tmp_path, "-e", "run", "-b", 4]
    line = [sys.executable, script, *map(str, flags), "--nproc-per-node", "2"]
    env, log = environment(EXERCISE=tmp_path), tmp_path / "run" / "metrics.jsonl"
    launcher = subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: log.exists() and log.stat().st_size, what="a step")
        launcher.kill()
        launcher.wait()
        size = log.stat().st_size
        wait_for(lambda: log.stat().st_size > size + 1000, what="more steps, without a launcher")
        assert len(processes_with(f"EXERCISE={tmp_path}")) >= 2
    finally:
        launcher.kill()
        for pid in processes_with(f"EXERCISE={tmp_path}"):
            os.kill(pid, 9)
