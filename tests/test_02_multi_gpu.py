"""What stage 02 promises: the training of stage 01, on several processes of one machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from lab.stages import (
    FOLDERS,
    ROOT,
    STEPS,
    command,
    environment,
    fork,
    metrics,
    notes_of,
    recorded,
    rows_read,
    run_forked,
    same_weights,
    train,
    worst_difference,
)
from test_01_single_gpu import SILENT, diverge, refuse


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """Return the process ids of the ranks that torchrun has started, in the order of the ranks."""
    ranks = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            env = (stat.parent / "environ").read_bytes() if parent == pid else b""
        except OSError:
            continue
        if match := re.search(rb"\0RANK=(\d+)\0", b"\0" + env):
            ranks[int(match[1])] = int(stat.parent.name)
    return [ranks[rank] for rank in sorted(ranks)]


def start(*flags, processes=2, torchrun=(), env=None):
    return subprocess.Popen(
        command("02", *flags, processes=processes, torchrun=torchrun),
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_rank(torchrun, rank, checkpoint, timeout=90):
    """Kill a rank as soon as there is a checkpoint and the run goes on; return all ranks' pids."""
    end = time.monotonic() + timeout
    while not checkpoint.exists():
        assert torchrun.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    ranks = children(torchrun.pid)
    os.kill(ranks[rank], signal.SIGKILL)
    return ranks


@pytest.mark.parametrize("processes, batch", [(1, 2), (2, 4), (4, 1)])
def test_same_loss_curve(flags, alone, tmp_path, processes, batch):
    """In new processes for two, as a reader starts them; the others are forked: see stages.py."""
    flags += [*STEPS, "-b", batch, "-e", "run"]
    done = train("02", *flags, processes=processes, forked=processes != 2)
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"{processes} processes, batch size {batch}: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == processes
    assert "arning" not in done.stderr.replace("OMP_NUM_THREADS", ""), done.stderr
    arithmetic = f"--batch-size {batch} x {processes} ranks x {8 // batch // processes} micro-steps"
    assert done.stderr.count(f"[rank 0] {arithmetic}: 8 x 64 tokens per step") == 1
    assert "[rank 1]" not in done.stderr and len(re.findall("^-{40}$", done.stdout, re.M)) == 3


def test_the_built_in_model_follows_one_curve_from_stage_to_stage(corpus, tmp_path):
    """A Llama, where the models of other tests are GPT-2s. 02 and then sharded are killed."""
    flags = ["-d", corpus / "corpus.jsonl", "--save-dir", tmp_path, *STEPS, "--ckpt-freq", 4]
    train("01", *flags, "-e", "alone")
    for stage, batch in {"02": 2, "sharded": 4, "03": 1}.items():
        env = {} if stage == "03" else recorded(tmp_path / f"notes{stage}", DIE=1)
        more = ["-b", batch, "-e", "run"]
        train(stage, *flags, *more, processes=2, env=env, fails=stage != "03")
    difference = worst_difference(metrics(tmp_path / "alone"), metrics(tmp_path / "run"))
    print(f"built-in model: largest difference {difference:.1e}")
    assert difference < 1e-4


def test_one_process_is_stage_01_bit_for_bit_also_with_dropout(flags, dropout_model, tmp_path):
    flags += ["-m", dropout_model, "--max-steps", 6]
    train("01", *flags, "-e", "alone")
    train("02", *flags, "-e", "one")
    assert same_weights(tmp_path / "alone", tmp_path / "one")


def rows_of_ranks(flags, folder, stage, processes):
    """Return the rows that each rank trains on in two epochs."""
    env = recorded(folder / stage, ALONE=1)
    train(stage, *flags, "--num-epochs", 2, processes=processes, env=env)
    return [rows_read(notes) for notes in notes_of(folder / stage, processes)]


def test_the_ranks_share_out_each_step_and_each_epoch(flags, few_texts, tmp_path):
    flags += ["-d", few_texts]
    (alone,) = rows_of_ranks([*flags, "-b", 8], tmp_path, "01", 1)
    ranks = rows_of_ranks([*flags, "-b", 4], tmp_path, "02", 2)
    assert len(alone) == sum(map(len, ranks))
    for step in range(len(alone) // 8):
        together = ranks[0][step * 4 : step * 4 + 4] + ranks[1][step * 4 : step * 4 + 4]
        assert sorted(together) == sorted(alone[step * 8 : step * 8 + 8]), step
    half = len(ranks[0]) // 2
    epoch = ranks[0][:half] + ranks[1][:half]
    assert len(set(epoch)) == len(epoch)
    assert ranks[0][:half] != ranks[0][half:], "a new order each epoch"


@pytest.fixture(scope="module")
def whole(dropout_model, corpus, tmp_path_factory):
    """The flags of a run on two processes, and the run that nothing has hurt."""
    flags = ["-m", dropout_model, "-d", corpus / "corpus.jsonl", "-b", 4]
    flags += ["--max-steps", 160, "--ckpt-freq", 20]
    folder = tmp_path_factory.mktemp("whole")
    train("02", *flags, "--save-dir", folder, "-e", "whole", processes=2)
    return flags, folder / "whole"


def test_killed_rank_ends_all_within_seconds_and_the_next_start_goes_on(whole, tmp_path):
    flags, unhurt = [*whole[0], "--save-dir", tmp_path, "-e", "killed"], whole[1]
    torchrun = start(*flags)
    ranks = kill_rank(torchrun, 1, tmp_path / "killed" / "checkpoint.pt")
    killed = time.monotonic()
    output, _ = torchrun.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    assert torchrun.returncode != 0 and "Signal 9 (SIGKILL)" in output
    assert not any(alive(pid) for pid in ranks)
    done = train("02", *flags, processes=2)
    assert re.search(r"step [1-9]\d* of 160, folder", done.stderr)
    assert same_weights(unhurt, tmp_path / "killed")
    assert worst_difference(metrics(unhurt), metrics(tmp_path / "killed")) == 0


def test_torchrun_restarts_heal_a_killed_rank(whole, tmp_path):
    flags, unhurt = [*whole[0], "--save-dir", tmp_path], whole[1]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}  # see the README: gloo needs it to restart
    torchrun = start(*flags, "-e", "healed", torchrun=["--max-restarts", "3"], env=env)
    kill_rank(torchrun, 1, tmp_path / "healed" / "checkpoint.pt")
    output, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, output
    assert re.search(r"step [1-9]\d* of 160, folder", output)
    assert same_weights(unhurt, tmp_path / "healed")


@pytest.mark.parametrize("first, then", [(("01", 1), ("02", 4)), (("02", 2), ("01", 1))])
def test_another_stage_or_number_of_processes_goes_on_along_the_curve(
    flags, alone, tmp_path, first, then
):
    """The first run is killed by a full stop at step 8: its checkpoint of step 16 never comes."""
    flags += [*STEPS, "-e", "run", "-b", 2]
    if first == ("01", 1):
        shutil.copytree(alone.parent / "half", tmp_path / "run")
    else:
        env = recorded(tmp_path / "notes", DIE=1, ALONE=1)
        train(first[0], *flags, processes=first[1], env=env, fails=True)
    assert list(metrics(tmp_path / "run"))[-1] == 8
    done = train(then[0], *flags, processes=then[1])
    assert "step 8 of 16, folder" in done.stderr
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4


def test_each_rank_has_its_own_dropout_wandb_run_and_trace_with_one_all_reduce_a_step(
    flags, dropout_model, tmp_path
):
    """Of four micro-batches: no_sync keeps the others from talking."""
    flags += ["-m", dropout_model, "-b", 1, "--global-batch-size", 8, "-e", "run"]
    flags += ["--max-steps", 12, "--log-freq", 100, "--profile"]
    train("02", *flags, processes=2, env={"WANDB_MODE": None})
    first, second = torch.load(tmp_path / "run" / "checkpoint.pt")["rng"]
    assert not torch.equal(first, second)
    files = [f.read_bytes() for f in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")]
    assert len(files) == 2
    assert all(any(f"run-rank{rank}".encode() in data for data in files) for rank in range(2))
    traces = list((tmp_path / "run").glob("*.pt.trace.json"))
    assert sorted(trace.name.split(".")[0] for trace in traces) == ["rank0", "rank1"]
    for trace in traces:
        events = json.loads(trace.read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("ph") == "X"]
        assert sum(name.startswith("ProfilerStep#") for name in names) == 5
        assert names.count("DistributedDataParallel.forward") == 20
        assert names.count("gloo:all_reduce") == 5, names.count("gloo:all_reduce")


# Two ranks meet, train a step and part as the stage does, again and again.
MEETINGS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
def main(number):
    meeting = dist.PrefixStore(str(number), store)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2)
    ddp_model = DDP(torch.nn.Linear(64, 64))
    ddp_model(torch.randn(4, 64)).sum().backward()
    dist.all_gather_object([None] * 2, torch.get_rng_state())
{ending}
for number in range(200):
    main(number)
"""


@pytest.mark.parametrize("of", ["the stage", "the smallest program"])
def test_no_rank_hangs_when_the_group_ends(tmp_path, of):
    """When DDP was the last to hold the process group, one of a hundred endings hung."""
    if of == "the stage":
        text, first = (ROOT / FOLDERS["02"] / "train_llm.py").read_text(), "    main.group = "
    else:
        text, first = (ROOT / FOLDERS["02"] / "README.md").read_text(), "del ddp_model"
    ending = re.search(rf"^{first}.*?dist.destroy_process_group\(\)$", text, re.M | re.S)[0]
    ending = textwrap.indent(textwrap.dedent(ending), "    ")
    (tmp_path / "meetings.py").write_text(MEETINGS.format(ending=ending))
    words = [str(tmp_path / name) for name in ("meetings.py", "store")]
    ranks = [fork([words[0], str(rank), words[1]]) for rank in range(2)]
    end = time.monotonic() + 100
    try:
        for rank in ranks:
            rank.join(max(0, end - time.monotonic()))
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_compiled_follows_the_same_curve(flags, alone, tmp_path):
    more = ["-b", 2, "-e", "run", "--compile"]
    train("02", *flags, *STEPS, *more, processes=2, timeout=500)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4


SHARED = ("other lr", "other data", "few data", "length", "no such data")
FAULTS = {what: SILENT[what] for what in SHARED} | {
    "batch": (["-b", 3], "--global-batch-size 8 is no multiple of --batch-size 3 x 2 ranks"),
    "damaged": ([], "checkpoint.pt is damaged: "),
}


@pytest.mark.parametrize("what", FAULTS)
def test_silent_fault_ends_all_ranks(flags, alone, corpus, tmp_path, what):
    shutil.copytree(alone, tmp_path / "run")
    if what == "damaged":
        (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    more, expected = FAULTS[what]
    more = [corpus / "text" if word == "TEXT" else word for word in more]
    refuse("02", 2, [*flags, *STEPS, "-b", 4, "-e", "run", *more], expected, tmp_path / "run")


def test_a_loss_that_is_no_number_ends_all_ranks(flags, tmp_path):
    diverge("02", 2, [*flags, "-b", 4], tmp_path / "run")


def test_a_rank_that_fails_early_ends_the_others_and_leaves_its_traceback(flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch.distributed as dist\n"
        "    def broken(*args, **kwargs): raise RuntimeError('the second GPU is on fire')\n"
        "    dist.init_process_group = broken\n"
    )
    logs = tmp_path / "logs"
    started = time.monotonic()
    done = train(
        "02",
        *flags,
        processes=2,
        torchrun=["--log-dir", str(logs)],
        env={"PYTHONPATH": tmp_path},
        fails=True,
        timeout=90,
        forked=False,
    )
    assert time.monotonic() - started < 60
    last = done.stderr[-2500:]
    assert "Root Cause" in last and "RuntimeError: the second GPU is on fire" in last
    (error,) = logs.rglob("error.json")
    assert "on fire" in json.loads(error.read_text())["message"]["message"]
    assert error.parent.name == "1", "the folder is named after the local rank"


def test_without_torchrun_the_last_line_names_what_it_sets():
    done = run_forked([str(ROOT / FOLDERS["02"] / "train_llm.py")], 60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'RANK'"


def test_prepare_only_ends_cleanly(flags, tmp_path):
    done = train("02", *flags, "-e", "run", "--prepare-only", processes=2)
    assert done.stdout.count("in the cache, also for jobs with HF_HUB_OFFLINE=1: ") == 2
    assert not (tmp_path / "run").exists()
