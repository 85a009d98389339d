"""The checker of the exercises accepts the stages, and catches and names each planted mistake."""

import os
import socket
import subprocess
import sys

import pytest
from check_exercise import ALL, check, check_device, prepare, reference
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


def changed(stage, tmp_path, *changes):
    """Return a reader's script: the stage's own, with changes, each (old, new)."""
    source = (ROOT / FOLDERS[stage] / "train_llm.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    script = tmp_path / "my_train_llm.py"
    script.write_text(source)
    return script


@pytest.mark.parametrize("stage", ["02", STAGE_03, "04"])
def test_the_stages_hold(right, tmp_path, stage):
    results = results_of(stage, ROOT / FOLDERS[stage] / "train_llm.py", right, tmp_path)
    assert len(results) == ALL and not any(results.values()), results


NO_SYNC = "ddp_model.no_sync() if micro_step < micro_steps else nullcontext()"
MISTAKES = {
    "every rank has all data": (
        ("DistributedSampler(data, ", "DistributedSampler(data, 1, 0, "),
        "reads the same data",
    ),
    "no set_epoch": (("sampler.set_epoch(epoch)", "0"), "sampler.set_epoch(epoch)"),
    "the model instead of DDP's": (("else ddp_model", "else model"), "not averaged over the ranks"),
    "always no_sync": ((NO_SYNC, "ddp_model.no_sync()"), "stand outside no_sync()"),
    "the loss of one rank": (
        ("dist.all_reduce(loss_sum)  # the sum over the ranks", "loss_sum *= world_size"),
        "the loss is that of one rank",
    ),
    "the sum of the losses": (
        ("loss_sum.item() / world_size,", "loss_sum.item(),"),
        "without dividing by their number",
    ),
    "accumulation not scaled": (
        ("loss = loss / micro_steps", "loss = loss"),
        "accumulation is scaled wrongly",
    ),
    "scheduler per micro-batch": (
        ("loss_sum += loss.detach()", "loss_sum += loss.detach(); scheduler.step()"),
        "the learning rate is wrong from step",
    ),
    "validation of one rank": (
        ("    dist.all_reduce(loss_sum)\n    model", "    model"),
        "val_loss is",
    ),
    "all ranks save": (
        ("if writes and save_now", "if run_dir and save_now"),
        ("metrics.stat()", "(run_dir / 'metrics.jsonl').stat()"),
        "2 ranks do",
    ),
    "all ranks log": (
        ("writes = run_dir is not None and rank == 0", "writes = run_dir is not None"),
        "every rank writes metrics.jsonl",
    ),
    "all on the first GPU": (
        ('torch.device("cuda", rank)', 'torch.device("cuda", 0)'),
        "local rank 1 takes GPU 0",
    ),
    "an epoch anew after a resume": (
        ("indices[position // world_size : epoch_samples", "indices[: epoch_samples"),
        "rows again that it has had",
    ),
    "scheduler not restored": (
        ('scheduler.load_state_dict(checkpoint["scheduler"])', "0"),
        "is the scheduler restored?",
    ),
    "optimizer not restored": (
        ('optimizer.load_state_dict(checkpoint["optimizer"])', "0"),
        "are weights and optimizer both restored",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(right, tmp_path, mistake):
    *changes, message = MISTAKES[mistake]
    script = changed("02", tmp_path, *changes)
    wrong = [text for text in results_of("02", script, right, tmp_path).values() if text]
    assert wrong and message in wrong[0], wrong


def test_a_device_by_the_rank_is_named(right, tmp_path):
    """In stage 03, where the local rank is not the rank."""
    new = 'torch.device("cuda", rank % torch.cuda.device_count())'
    script = changed("03", tmp_path, ('torch.device("cuda", local_rank)', new))
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
    script = changed("02", tmp_path, (NO_SYNC, "nullcontext()"))
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
