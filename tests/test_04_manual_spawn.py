"""What stage 04 promises: the training of stage 03 without torchrun, and nobody left behind."""

import itertools
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, finish, wait_for, why_not
from stages import (
    FOLDERS,
    ROOT,
    STEPS,
    command,
    environment,
    metrics,
    recorded,
    train,
    worst_difference,
)

SCRIPT = ROOT / FOLDERS["04"] / "train_llm.py"
README = (SCRIPT.parent / "README.md").read_text()
BIN = Path(sys.executable).parent
REASON = why_not()
needs_hosts = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

TIMEOUT = 15  # what the runs that are hurt are given as --timeout
LAUNCHERS = ("SLURM_", "PBS_", "PMI_", "PALS_", "OMPI_", "MASTER_")


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    hosts("up")
    yield hosts
    hosts.down()


@pytest.fixture(scope="module")
def stage():
    """The script as a module: what it does before it starts a process needs none."""
    return runpy.run_path(str(SCRIPT), run_name="stage_04")


@pytest.fixture
def ask(stage, monkeypatch):
    """Run `parse_args` and `launch` up to the start of the processes; return the flags then."""
    settled = {}
    monkeypatch.setattr("torch.multiprocessing.spawn", lambda *args, **kwargs: 1 / 0)

    def ask(line="", **env):
        for name in list(os.environ):
            if name.startswith(LAUNCHERS):
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["train_llm.py", *line.split()])
        settled["args"] = stage["parse_args"]()
        with pytest.raises(ZeroDivisionError):
            stage["launch"](settled["args"])
        return settled["args"]

    return ask


def spawn(hosts, node_rank, *flags, processes=1, host=None, **env):
    """Start stage 04 on one of the two hosts."""
    more = ["--nnodes", 2, "--node-rank", node_rank, "--nproc-per-node", processes]
    more += ["--master-addr", "node1"]
    return hosts.start(host or f"node{node_rank + 1}", sys.executable, SCRIPT, *flags, *more, **env)


def of_session(number, words=""):
    """Return the pids, in order, of a session's processes that have words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
            line = (folder / "cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if int(session) == number and state != "Z" and words in line:
            found.append(int(folder.name))
    return sorted(found)


def test_ranks_are_complete_and_in_order_for_any_cluster(stage, monkeypatch):
    """The arithmetic of `worker`, with a main that only looks at what it was told."""
    told = []
    worker, keys = stage["worker"], ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    monkeypatch.setitem(
        worker.__globals__, "main", lambda args: told.append([int(os.environ[k]) for k in keys])
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["train_llm.py"])
    args = stage["parse_args"]()
    for nnodes, nproc in itertools.product((1, 2, 3, 8, 17), (1, 2, 4, 17)):
        args.nnodes, args.nproc_per_node, args.master_port = nnodes, nproc, 1
        told.clear()
        for args.node_rank in range(nnodes):
            for local_rank in range(nproc):
                worker(local_rank, args)
        assert told == [[i, nnodes * nproc, i % nproc] for i in range(nnodes * nproc)]
        for args.node_rank in (nnodes, -1):
            with pytest.raises(AssertionError, match="--node-rank"):
                worker(0, args)


def test_same_loss_curve_both_ways_to_say_the_world_size(flags, alone, tmp_path):
    """With one log and one run of wandb per rank, and the rows from the cache."""
    for processes, batch, way in [(1, 8, "env"), (2, 4, "args"), (4, 1, "env")]:
        name, more = f"run{processes}", ["--world-size-from", way, "-b", batch]
        env = {"WANDB_MODE": None} if processes == 4 else {}
        train("04", *flags, *STEPS, *more, "-e", name, processes=processes, env=env)
        difference = worst_difference(metrics(alone), metrics(tmp_path / name))
        print(f"{processes} processes, batch size {batch}: largest difference {difference:.1e}")
        assert difference < 1e-4
        assert metrics(tmp_path / name)[16]["world_size"] == processes
    for rank in range(4):
        assert f"rank {rank}] step 16" in (tmp_path / "run4" / f"rank{rank}.log").read_text()
    assert len(list((tmp_path / "run4" / "wandb").glob("offline-run-*/*.wandb"))) == 4


@needs_hosts
def test_same_loss_curve_on_two_hosts_also_if_node_0_comes_last(hosts, flags, alone, tmp_path):
    flags = [*flags, *STEPS, "-b", 1, "-e", "run"]
    second = spawn(hosts, 1, *flags, processes=2)
    time.sleep(5)
    first = spawn(hosts, 0, *flags, processes=2)
    outputs = finish(first, second)
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 4


def test_checkpoints_move_between_the_stages(flags, alone, tmp_path):
    flags += [*STEPS, "-e", "run", "-b", 4]
    train("03", *flags, processes=2, env=recorded(tmp_path / "notes", DIE=1), fails=True)
    assert "step 8 of 16" in train("04", *flags, processes=2).stderr
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    assert "step 16 of 18" in train("02", *flags, "--max-steps", 18, processes=2).stderr


def test_the_data_of_another_stage_is_found_in_the_cache(flags, tmp_path):
    """Though spawn runs the file under another name, and `datasets` knows a function by its."""
    env = {"HF_HOME": tmp_path / "cache"}
    train("03", *flags, "--prepare-only", env=env)
    before = sorted((tmp_path / "cache").rglob("*.arrow"))
    train("04", *flags, "--prepare-only", env=env)
    assert before and sorted((tmp_path / "cache").rglob("*.arrow")) == before


@pytest.fixture
def long(flags, dropout_model, tmp_path):
    """A run that only its end by force ends."""
    more = ["-m", dropout_model, "--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 100_000]
    return [*flags, *more, "-b", 2, "--timeout", TIMEOUT, "-e", "run"]


@pytest.mark.parametrize(
    "number, whom, said",
    [
        (signal.SIGTERM, "launcher", "stopped by SIGTERM after step"),
        (signal.SIGUSR1, "launcher", "stopped by SIGUSR1 after step"),
        (signal.SIGINT, "all", "terminated with signal SIGINT"),
        (signal.SIGKILL, "launcher", ""),
        (signal.SIGKILL, "rank 1", "process 1 terminated with signal SIGKILL"),
    ],
)
def test_no_process_is_left_behind(long, tmp_path, number, whom, said):
    """In the middle of the training, with wandb, whose processes must go too."""
    with open(tmp_path / "output", "w+") as output:
        run = subprocess.Popen(
            command("04", *long, processes=2),
            env=environment(WANDB_MODE=None),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # as a shell does for Ctrl-C
        )
        path = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: path.exists() and path.read_text().count("\n") > 1, what=output.name)
        began = time.monotonic()
        if whom == "all":
            os.killpg(run.pid, number)
        else:
            pids = {"launcher": run.pid, "rank 1": of_session(run.pid, "spawn_main")[1]}
            os.kill(pids[whom], number)
        status = run.wait(60)
        wait_for(lambda: not of_session(run.pid), timeout=20, what="all have ended")
    print(f"{number.name} to {whom}: {status}, all ended after {time.monotonic() - began:.1f} s")
    text = (tmp_path / "output").read_text()
    assert (status == 0) == (number == signal.SIGUSR1), text
    assert said in text, text
    if "after step" in said:
        assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_ends_while_its_ranks_start_leaves_nobody(long, tmp_path, number):
    run = subprocess.Popen(
        command("04", *long, processes=2),
        env=environment(HF_HOME=tmp_path / "cache"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: len(of_session(run.pid, "spawn_main")) == 2, what="the ranks start")
    time.sleep(1)
    run.send_signal(number)
    assert run.wait(60) != 0
    wait_for(lambda: not of_session(run.pid), timeout=20, what="all have ended")


def test_an_exception_ends_all_and_is_the_last_thing_said(flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'spawn_main' in str(sys.orig_argv):\n"
        "    import torch\n"
        "    def clip(*args):\n"
        "        if os.environ['RANK'] == '1': raise ValueError('planted')\n"
        "        return torch.zeros(())\n"
        "    torch.nn.utils.clip_grad_norm_ = clip\n"
    )
    done = train("04", *flags, processes=2, env={"PYTHONPATH": tmp_path}, fails=True)
    assert done.stderr.strip().splitlines()[-1] == "ValueError: planted", done.stderr
    assert "Process 1 terminated with the following error" in done.stderr


@needs_hosts
@pytest.mark.slow
def test_a_lost_node_ends_the_other_in_time(hosts, long, tmp_path):
    runs = [spawn(hosts, node_rank, *long) for node_rank in (0, 1)]
    path = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 1, what=path)
    began = time.monotonic()
    hosts("off", "node2")
    (output,) = finish(runs[0], timeout=90)
    print(f"node1 ended {time.monotonic() - began:.1f} s after node2 had lost power")
    assert runs[0].returncode == 1 and time.monotonic() - began < TIMEOUT + 20
    assert f"Timed out waiting {TIMEOUT}000ms" in output, output


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_NUM_NODES": 3, "SLURM_STEP_NUM_NODES": 3, "SLURM_NODEID": 2},
        {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 3},  # Open MPI
        {"PMI_RANK": 2, "PMI_SIZE": 3, "SLURM_JOB_NUM_NODES": 3, "SLURM_NODEID": 0},  # MPICH
        {"PALS_RANKID": 2, "PMI_SIZE": 3, "PBS_NODENUM": 0, "PBS_NODEFILE": "/nope"},  # HPE
    ],
)
def test_the_nodes_come_from_the_launcher(ask, env):
    args = ask("--master-addr 192.0.2.1", **env)
    assert (args.nnodes, args.node_rank, args.master_port) == (3, 2, 29500)


def test_pbsdsh_says_which_node_and_the_flags_how_many(ask, tmp_path):
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    env = {"PBS_NODEFILE": tmp_path / "nodes", "PBS_NODENUM": 1, "MASTER_ADDR": "192.0.2.1"}
    args = ask("--nnodes 2 --nproc-per-node 2", **env)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == (2, 1, 2)


def test_one_node_takes_a_free_port_of_its_own(ask):
    ports = {ask().master_port for _ in range(5)}
    assert len(ports) > 1 and ask().master_addr == "127.0.0.1"
    assert ask(MASTER_PORT=29517).master_port == 29517
    assert ask("--nnodes 1", SLURM_JOB_NUM_NODES=2).nnodes == 1  # on purpose


NO_ADDRESS = "error: --master-addr '{}': other nodes cannot reach it"
SILENT = [  # what would train, and look right
    (
        "",
        {"SLURM_JOB_NUM_NODES": 2, "SLURM_NODEID": 0},
        "error: the job has 2 nodes: start this on",
    ),
    ("", {"PBS_NODEFILE": "{nodes}"}, "error: the job has 2 nodes: start this on each, or say"),
    ("--nnodes 2 --node-rank 0", {}, NO_ADDRESS.format("127.0.0.1")),
    ("--nnodes 2 --node-rank 1 --master-addr=", {}, NO_ADDRESS.format("")),  # "$NOT_SET"
    ("--nnodes 2 --node-rank 0 --master-addr localhost", {}, NO_ADDRESS.format("localhost")),
    ("--nnodes 2 --node-rank 0 --master-addr 127.0.1.1", {}, NO_ADDRESS.format("127.0.1.1")),
]


@pytest.mark.parametrize("line, env, message", SILENT)
def test_silent_faults_are_refused(ask, tmp_path, line, env, message):
    (tmp_path / "nodes").write_text("n1\nn2\n")
    env = {name: str(value).format(nodes=tmp_path / "nodes") for name, value in env.items()}
    with pytest.raises(SystemExit) as error:
        ask(line, **env)
    assert str(error.value).startswith(message)


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


def test_loud_faults_end_with_a_true_last_line(flags):
    """A port that is taken, a node 0 whose address is another's, a node rank too large."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = train("04", *flags, "--master-port", port, processes=2, fails=True)
    assert re.search(rf"Address already in use .*'127.0.0.1', {port}\)", last_line(done))
    other = ["--nnodes", 2, "--node-rank", 0, "--master-addr", "192.0.2.1"]
    assert "Cannot assign requested address" in last_line(train("04", *flags, *other, fails=True))
    large = ["--nnodes", 2, "--node-rank", 2, "--master-addr", "192.0.2.1"]
    assert last_line(train("04", *flags, *large, fails=True)) == (
        "AssertionError: --node-rank 2 of --nnodes 2"
    )


@needs_hosts
@pytest.mark.slow
def test_two_launchers_with_one_node_rank_end_in_time(hosts, flags):
    """Both 0: the second is not at the address of node 0. Both 1: nobody serves the store."""
    flags, began = [*flags, "--timeout", 5], time.monotonic()  # torch tries several times so long
    wrong = spawn(hosts, 0, *flags, host="node2")
    both = [spawn(hosts, 1, *flags, host=host) for host in ("node1", "node2")]
    outputs = finish(wrong, *both, timeout=180)
    print(f"all ended after {time.monotonic() - began:.0f} s")
    assert all(run.returncode == 1 for run in (wrong, *both)), outputs
    assert "Cannot assign requested address" in outputs[0].splitlines()[-1]
    for output in outputs[1:]:
        assert "The client socket has timed out after" in output, output


def test_both_ways_to_say_the_world_size_and_the_error_without_either():
    """The README's example, whose last line is meant to fail."""
    (example,) = re.findall(r"```python\n(import os\n.*?)```", README, re.DOTALL)
    line = [sys.executable, "-c", example]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr
    assert done.stderr.splitlines()[-1].partition("ValueError: ")[2] in README, done.stderr


def test_two_terminals_and_the_variables_by_hand():
    """The README's first block, word for word."""
    (block,) = re.findall(r"```bash\n(export MASTER_ADDR.*?)```", README, re.DOTALL)
    done = subprocess.run(
        ["bash", "-ec", block],
        cwd=SCRIPT.parent,
        env=environment(PATH=f"{BIN}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0] step 20 " in done.stderr
