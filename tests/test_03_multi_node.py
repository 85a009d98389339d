"""What stage 03 promises: the training of stage 01 on several hosts, and failures that end soon."""

import itertools
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from hosts import Hosts, finish, signal_rank, wait_for, why_not
from stages import ROOT, command, environment, metrics, same_weights, train, worst_difference

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

STEPS = ["--max-steps", 16, "--log-freq", 1, "--ckpt-freq", 8, "--global-batch-size", 8]
TIMEOUT = 6  # what the runs that are hurt are given as --timeout


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    hosts("up")
    yield hosts
    hosts.down()


@pytest.fixture(scope="module")
def alone(model, corpus, tmp_path_factory):
    """Stage 01's run: the curve that all others must follow."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "--save-dir", folder, "-e", "run"]
    train("01", *flags, *STEPS, "-b", 8)
    return folder / "run"


@pytest.fixture
def long(flags, dropout_model, tmp_path):
    """A run that only a failure ends, saved every few steps."""
    more = ["-m", dropout_model, "--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 10]
    return [*flags, *more, "--global-batch-size", 8, "-b", 2, "--timeout", TIMEOUT, "-e", "run"]


def saved_step(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]


def once_saved(tmp_path, *runs):
    """Wait until a run has a checkpoint and goes on."""
    path = tmp_path / "run" / "checkpoint.pt"
    wait_for(lambda: path.exists() or any(r.poll() is not None for r in runs), what=str(path))
    assert all(run.poll() is None for run in runs), [run.output.read_text() for run in runs]
    time.sleep(1)


@pytest.mark.parametrize("processes, batch", [(1, 4), (2, 1)])
def test_same_loss_curve_on_two_hosts(hosts, flags, alone, tmp_path, processes, batch):
    runs = hosts.both(*flags, *STEPS, "-b", batch, "-e", "run", processes=processes)
    outputs = finish(*runs)
    assert [run.returncode for run in runs] == [0, 0], outputs
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"2 hosts x {processes}, batch size {batch}: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 2 * processes
    last = f"rank{2 * processes - 1}"
    assert (
        f"[node2 rank {2 * processes - 1}] step    16"
        in (tmp_path / "run" / last / "log.txt").read_text()
    )
    assert list((tmp_path / "run" / last / "wandb").glob("offline-run-*/*.wandb"))


def test_stage_03_continues_what_02_began_and_01_what_03_began(hosts, flags, alone, tmp_path):
    flags += [*STEPS, "-e", "run", "-b", 2]
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "replace = os.replace\n"
        "def replace_then_die(a, b):\n"
        "    replace(a, b)\n"
        "    if str(b).endswith('checkpoint.pt'): os.kill(os.getpid(), 9)\n"
        "os.replace = replace_then_die\n"
    )
    train("02", *flags, processes=2, env={"PYTHONPATH": tmp_path}, fails=True)
    assert saved_step(tmp_path / "run") == 8
    finish(*hosts.both(*flags, processes=1))
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    done = train("01", *flags, "--max-steps", 18)
    assert "resuming after step 16" in done.stderr


FAULTS = {
    "killed rank": "a rank has died; first, rank",
    "frozen rank": "no answer from rank 3 on node2: ",
    "host without power": "no answer from rank 2 on node2, rank 3 on node2: ",
    "cut link": "no answer from rank 2 on node2, rank 3 on node2: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_survivors_end_in_time_and_say_what_happened(hosts, long, tmp_path, fault):
    runs = hosts.both(*long, processes=2)
    once_saved(tmp_path, *runs)
    began = time.monotonic()
    if fault == "killed rank":
        signal_rank(3, signal.SIGKILL, start=tmp_path)
    elif fault == "frozen rank":
        signal_rank(3, signal.SIGSTOP, start=tmp_path)
    elif fault == "host without power":
        hosts("off", "node2")
    elif fault == "cut link":
        # The kernel tells torchrun that its connection is dead after 15 minutes, here after 15 s.
        hosts("run", "node2", "sysctl", "-qw", "net.ipv4.tcp_retries2=5")
        hosts("cut")
    (survivor,) = finish(runs[0], timeout=60)
    print(f"{fault}: node1 ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < TIMEOUT + 25
    assert runs[0].returncode != 0 and FAULTS[fault] in survivor, survivor
    (other,) = finish(runs[1], timeout=90)  # a frozen process is killed after torchrun's 30 s
    print(f"{fault}: node2 ended after {time.monotonic() - began:.1f} s")
    assert runs[1].returncode != 0
    if fault == "cut link":
        assert "no answer from node1, which holds the store" in other, other
    # Nothing is lost: what is left of the cluster goes on.
    hosts("heal") if fault == "cut link" else hosts("up")
    step = saved_step(tmp_path / "run")
    run = hosts.torchrun("node1", *long, "--max-steps", step + 10, nnodes="1")
    (output,) = finish(run)
    assert run.returncode == 0 and f"resuming after step {step}" in output, output
    assert list(metrics(tmp_path / "run"))[-1] == step + 10


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(hosts, long, tmp_path):
    long += ["--max-steps", 200]
    runs = hosts.both(*long)
    wait_for(lambda: (tmp_path / "run" / "checkpoint.pt").exists())
    signal_rank(1, signal.SIGKILL, start=tmp_path)
    finish(*runs)
    assert saved_step(tmp_path / "run") < 200
    runs = hosts.both(*long)
    outputs = finish(*runs)
    assert [run.returncode for run in runs] == [0, 0], outputs
    finish(*hosts.both(*long, "-e", "whole"))
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run")) == 0


def test_shrinks_to_one_host_and_grows_back_along_the_same_curve(hosts, long, model, tmp_path):
    long += ["-m", model]
    elastic = {"nnodes": "1:2", "options": ["--max-restarts", 3]}
    elastic["options"] += ["--rdzv-conf", "last_call_timeout=3"]
    runs = hosts.both(*long, **elastic)
    once_saved(tmp_path, *runs)

    def sizes():
        return [row["world_size"] for row in metrics(tmp_path / "run").values()]

    hosts("off", "node2")
    began = time.monotonic()
    wait_for(lambda: sizes()[-1] == 1, what="node1 goes on alone")
    print(f"the next step came {time.monotonic() - began:.1f} s after node2 had lost power")
    hosts("up")
    hosts.torchrun("node2", *long, **elastic)
    wait_for(lambda: sizes()[-1] == 2, what="both go on")
    hosts("down")
    assert [size for size, _ in itertools.groupby(sizes())] == [2, 1, 2]

    run, last = metrics(tmp_path / "run"), list(metrics(tmp_path / "run"))[-1]
    line = command(
        "01", *[flag for flag in long if flag not in ("--timeout", TIMEOUT)], "-e", "alone"
    )
    with subprocess.Popen(line, env=environment(), stderr=subprocess.DEVNULL) as alone:
        path = tmp_path / "alone" / "metrics.jsonl"
        wait_for(lambda: path.exists() and f'"step": {last},' in path.read_text(), timeout=120)
        alone.kill()
    reference = {step: row for step, row in metrics(tmp_path / "alone").items() if step in run}
    assert worst_difference(reference, run, keys=["loss"]) < 1e-4


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_saves_and_stops_all_at_one_step(hosts, long, tmp_path, number, code):
    runs = hosts.both(*long, "--ckpt-freq", 100_000, processes=2)
    path = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 2)
    began = time.monotonic()
    signal_rank(2, number, start=tmp_path)
    outputs = finish(*runs, timeout=30)
    assert time.monotonic() - began < 15
    assert [bool(run.returncode) for run in runs] == [bool(code)] * 2, outputs
    assert f"stopped by {number.name} after step" in outputs[0], outputs
    assert saved_step(tmp_path / "run") == list(metrics(tmp_path / "run"))[-1]


def test_sigterm_to_one_torchrun_saves_within_its_grace_time(hosts, long, tmp_path):
    runs = hosts.both(*long, "--ckpt-freq", 100_000)
    path = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 2)
    hosts("run", "node2", "pkill", "-TERM", "-o", "-f", "torch.distributed.run")
    outputs = finish(*runs, timeout=60)
    assert all(run.returncode for run in runs), outputs
    assert saved_step(tmp_path / "run") == list(metrics(tmp_path / "run"))[-1]
    assert "stopped by SIGTERM after step" in outputs[0]


def disagreement(hosts, flags, on_node2=(), **options):
    """Run with something else on node2; return what the two hosts say, which must be the same."""
    runs = [hosts.torchrun("node1", *flags)]
    runs += [hosts.torchrun("node2", *flags, *on_node2, **options)]
    outputs = finish(*runs)
    assert all(run.returncode for run in runs), outputs
    tables = [re.search(r"error: the ranks must agree:\n(.*)", text) for text in outputs]
    assert tables[0] and tables[1] and tables[0][1] == tables[1][1], outputs
    return tables[0][1].strip()


def test_other_flags_on_a_node(hosts, flags):
    table = disagreement(hosts, flags, ["--lr", 0.5])
    assert table == "--lr: 0.002 on node1; 0.5 on node2"


def test_another_script_on_a_node(hosts, flags, tmp_path):
    changed = tmp_path / "train_llm.py"
    changed.write_text((ROOT / "03-multi-node" / "train_llm.py").read_text() + "# changed\n")
    assert re.fullmatch(
        r"train_llm.py: \w{12} on node1; \w{12} on node2",
        disagreement(hosts, flags, script=changed),
    )


def test_another_version_on_a_node(hosts, flags, tmp_path):
    """What a package says of itself is enough to try this: a second torch is 200 MB."""
    info = tmp_path / "other" / "torch-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    table = disagreement(hosts, flags, PYTHONPATH=tmp_path / "other")
    assert re.fullmatch(r"torch: 2\S+ on node1; 9.9 on node2", table)


def test_other_data_on_a_node(hosts, flags, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join((corpus / "corpus.jsonl").read_text().splitlines(True)[:200]))
    hosts("run", "node2", "mount", "--bind", other, corpus / "corpus.jsonl")
    table = disagreement(hosts, flags)
    assert re.fullmatch(r"data: (\d+) rows \w+ on node1; (\d+) rows \w+ on node2", table)


def test_a_save_folder_that_is_not_shared(hosts, flags, tmp_path):
    (tmp_path / "outputs").mkdir()
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "outputs")
    table = disagreement(hosts, [*flags, "--save-dir", tmp_path / "outputs", "-e", "run"])
    assert table == "--save-dir: on the disk of rank 0 on node1; not shared on node2"
