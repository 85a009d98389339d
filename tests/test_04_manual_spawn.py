"""What stage 04 promises: the training of stage 03 without torchrun, and nobody left behind."""

import importlib.util
import itertools
import os
import re
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
    error_line,
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

TIMEOUT = 6
KILLED = "rank 1 has failed: process 1 terminated with signal SIGKILL"


@pytest.fixture(scope="module")
def stage():
    """The script as a module: what it does before it starts a process needs none."""
    spec = importlib.util.spec_from_file_location("stage_04", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settle(stage, monkeypatch, caplog):
    """Settle nodes and master from flags and environment; return the flags, or the error."""

    def settle(line, **env):
        monkeypatch.setattr(sys, "argv", ["train_llm.py", *line.split()])
        for name in list(os.environ):
            if name.startswith(("SLURM_", "PBS_", "PMI_", "OMPI_", "MASTER_", "WORLD_", "TORCHEL")):
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        stage.log.setLevel("INFO")
        try:
            args = stage.parse_args()
            stage.settle_the_nodes(args)
            if stage.serve_the_store(args) is None:
                assert args.node_rank > 0
        except SystemExit as error:
            return str(error)
        return args

    return settle


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    hosts("up")
    yield hosts
    hosts.down()


def spawn(hosts, node_rank, *flags, processes=1, **env):
    """Start stage 04 on one of the two hosts."""
    more = ["--nnodes", 2, "--node-rank", node_rank, "--nproc-per-node", processes]
    host = f"node{node_rank + 1}"
    return hosts.start(host, sys.executable, SCRIPT, *flags, *more, "--master-addr", "node1", **env)


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


def test_ranks_are_complete_and_in_order_for_any_cluster(stage):
    for nnodes, nproc in itertools.product(range(1, 18), range(1, 18)):
        places = [
            stage.place(nnodes, nproc, node_rank, local_rank)
            for node_rank in range(nnodes)
            for local_rank in range(nproc)
        ]
        assert [rank for rank, _ in places] == list(range(nnodes * nproc))
        assert {world_size for _, world_size in places} == {nnodes * nproc}
        for wrong in ((nnodes, 0), (-1, 0), (0, nproc), (0, -1)):
            with pytest.raises(AssertionError):
                stage.place(nnodes, nproc, *wrong)


@pytest.mark.parametrize("processes, batch", [(1, 8), (2, 4), (4, 1)])
def test_same_loss_curve(flags, alone, tmp_path, processes, batch):
    wandb = {"WANDB_MODE": None}
    train("04", *flags, *STEPS, "-b", batch, "-e", "run", processes=processes, env=wandb)
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"{processes} processes, batch size {batch}: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == processes
    last = tmp_path / "run" / f"rank{processes - 1}"
    assert f"rank {processes - 1}] step    16" in (last / "log.txt").read_text()
    assert list((last / "wandb").glob("offline-run-*/*.wandb"))


@needs_hosts
def test_same_loss_curve_on_two_hosts_also_if_node_0_comes_last(hosts, flags, alone, tmp_path):
    flags = [*flags, *STEPS, "-b", 1, "-e", "run"]
    second = spawn(hosts, 1, *flags, processes=2)
    said = "node 0 does not answer yet at node1:29500 (10.77.0.1): [Errno 111] Connection refused"
    wait_for(lambda: said in second.output.read_text(), what=second.output)
    first = spawn(hosts, 0, *flags, processes=2)
    outputs = finish(first, second)
    assert [first.returncode, second.returncode] == [0, 0], outputs
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"2 hosts x 2: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 4


def test_checkpoints_move_between_the_stages(flags, alone, tmp_path):
    flags += [*STEPS, "-e", "run", "-b", 4]
    train("03", *flags, processes=2, env=recorded(tmp_path / "notes", DIE=1), fails=True)
    done = train("04", *flags, processes=2)
    assert "resuming after step 8" in done.stderr
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    done = train("02", *flags, "--max-steps", 18)
    assert "resuming after step 16" in done.stderr


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
    "number, whom, code, said",
    [
        (signal.SIGTERM, "launcher", 143, "stopped by SIGTERM after step"),
        (signal.SIGUSR1, "launcher", 0, "stopped by SIGUSR1 after step"),
        (signal.SIGINT, "all", 1, "stopped: with -e, the same command goes on"),
        (signal.SIGKILL, "launcher", -9, ""),
        (signal.SIGKILL, "rank 1", 137, KILLED),
    ],
)
def test_no_process_is_left_behind(long, tmp_path, number, whom, code, said):
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
        assert run.wait(60) == code, (tmp_path / "output").read_text()
        wait_for(lambda: not of_session(run.pid), timeout=20, what="all have ended")
    print(f"{number.name} to {whom}: all ended after {time.monotonic() - began:.1f} s")
    text = (tmp_path / "output").read_text()
    assert said in text and text.count("Traceback") == 0, text
    if "after step" in said:
        assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_ends_during_the_preparation_leaves_nobody(long, tmp_path, number):
    """When rank 0 makes the rows, with three processes of its own, which hear no signal."""
    run = subprocess.Popen(
        command("04", *long, processes=2),
        env=environment(HF_HOME=tmp_path / "cache"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # The launcher, its resource tracker, two ranks, and of rank 0 a manager and at least a worker.
    wait_for(lambda: len(of_session(run.pid)) >= 6, what="rank 0 makes the rows")
    run.send_signal(number)
    assert run.wait(60) != 0
    wait_for(lambda: not of_session(run.pid), timeout=20, what="all have ended")


def test_an_exception_shows_one_traceback_and_its_rank(flags, tmp_path):
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
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert "rank 1 has failed" in done.stderr and "ValueError: planted" in done.stderr


@needs_hosts
def test_a_lost_node_ends_the_other_in_time(hosts, long, tmp_path):
    runs = [spawn(hosts, node_rank, *long) for node_rank in (0, 1)]
    path = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") > 1, what=path)
    began = time.monotonic()
    hosts("off", "node2")
    (output,) = finish(runs[0], timeout=60)
    print(f"node1 ended {time.monotonic() - began:.1f} s after node2 had lost power")
    assert runs[0].returncode == 1 and time.monotonic() - began < TIMEOUT + 20
    assert "no answer from rank 1 on node2" in output and "rank 0 has failed" in output
    assert output.count("Traceback") == 1


SLURM = {"SLURM_JOB_NUM_NODES": 3, "SLURM_STEP_NUM_NODES": 3, "SLURM_LOCALID": 0}
LAUNCHERS = {
    "srun": SLURM | {"SLURM_NODEID": 2},
    "mpiexec of Open MPI": {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 3},
    "mpiexec of MPICH": {"PMI_RANK": 2, "PMI_SIZE": 3, "MPI_LOCALRANKID": 0},
    "mpiexec in a Slurm job": {"PMI_RANK": 2, "PMI_SIZE": 3, "SLURM_JOB_NUM_NODES": 3},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_nodes_come_from_the_launcher(settle, caplog, launcher):
    args = settle("--master-addr 10.77.0.1", **LAUNCHERS[launcher])
    assert (args.nnodes, args.node_rank, args.master_port) == (3, 2, 29500)
    assert re.search(r"--node-rank 2 comes from \w+", caplog.text)
    assert re.search(r"--nnodes 3 comes from \w+", caplog.text)


def test_the_nodes_come_from_pbs(settle, tmp_path):
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    env = {"PBS_NODEFILE": tmp_path / "nodes", "PBS_NODENUM": 1, "MASTER_ADDR": "10.77.0.1"}
    args = settle("--nproc-per-node 2", **env)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == (2, 1, 2)


def test_one_node_takes_a_free_port_of_its_own(settle):
    ports = {settle("").master_port for _ in range(5)}
    assert len(ports) > 1 and settle("").master_addr == "127.0.0.1"
    assert settle("", MASTER_PORT=29517).master_port == 29517


NODE_0 = "--nnodes 2 --node-rank 0"
BAD = [
    ("--nnodes 2 --master-addr 10.1.1.1", {}, "--nnodes 2: say --node-rank too"),
    (NODE_0, {}, "--nnodes 2: say --master-addr too"),
    (f"{NODE_0} --master-addr=", {}, "--nnodes 2: say --master-addr too"),  # "$NOT_SET"
    ("--nnodes 2 --node-rank 2", {}, "--node-rank 2: the nodes of --nnodes 2 are 0 to 1"),
    ("--node-rank -1", {}, "--node-rank -1: the nodes of --nnodes 1 are 0 to 0"),
    ("--nnodes 2", SLURM | {"SLURM_NODEID": 1}, "--nnodes is 2, but SLURM_STEP_NUM_NODES says 3"),
    ("--node-rank 0", SLURM | {"SLURM_NODEID": 1}, "--node-rank is 0, but SLURM_NODEID says 1"),
    ("", SLURM | {"SLURM_NODEID": 1, "SLURM_LOCALID": 1}, "SLURM_LOCALID is 1: start this script"),
    ("", {"SLURM_JOB_NUM_NODES": 2}, "SLURM_JOB_NUM_NODES is 2, but srun did not start this"),
    ("--master-port 29500", {"MASTER_PORT": 29501}, "--master-port is 29500, but MASTER_PORT says"),
    ("", {"MASTER_PORT": "http"}, "MASTER_PORT is http: "),
    ("", {"PBS_NODENUM": 0, "PBS_NODEFILE": "/nope"}, "PBS_NODEFILE is /nope: "),
    ("--master-port 70000", {}, "--master-port 70000: must be 1 to 65535"),
    ("", {"MASTER_PORT": 70000}, "--master-port 70000: must be 1 to 65535"),
    ("--nproc-per-node 2", {"WORLD_SIZE": 4}, "WORLD_SIZE is 4, but 1 nodes x 2 processes are 2"),
    ("", {"TORCHELASTIC_RUN_ID": "x"}, "start this stage with python"),
    (f"{NODE_0} --master-addr localhost", {}, "--master-addr localhost is 127.0.0.1 on "),
    (f"{NODE_0} --master-addr 127.0.1.1", {}, "where no other node can reach it"),
    (f"{NODE_0} --master-addr no.such.host.invalid", {}, "--master-addr no.such.host.invalid: "),
    (f"{NODE_0} --master-addr 192.0.2.1", {}, "192.0.2.1 is no address of this host"),
]


@pytest.mark.parametrize("line, env, message", BAD)
def test_bad_input(settle, line, env, message):
    error = settle(line, **env)
    assert isinstance(error, str) and error.startswith("error: ") and message in error, error


def test_the_readme_s_messages_are_those_of_the_script(settle):
    errors = [settle(line, **env) for line, env, _ in BAD]
    errors += [KILLED, "cannot listen at", "node 0 does not answer yet"]  # in other tests
    section = README.partition("## When it goes wrong")[2].partition("## Key")[0]
    rows = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(rows) >= 10
    for text in rows:
        torch_s_own = text.startswith("The client socket has timed out")
        assert torch_s_own or any(text in error for error in errors), text


def test_a_port_that_is_taken_is_said_at_once_and_not_replaced(flags):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        began = time.monotonic()
        done = train("04", *flags, "--master-port", port, processes=2, fails=True)
    assert time.monotonic() - began < 60
    line = error_line(done)
    assert f"--master-port: cannot listen at 127.0.0.1:{port} (127.0.0.1): Address already" in line


def test_more_processes_than_gpus(settle, monkeypatch):
    """No GPUs here: two are pretended, for four processes."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "--nproc-per-node 4: " in settle("--nproc-per-node 4")
    assert settle("").nproc_per_node == 2


def test_both_ways_to_say_the_world_size_and_the_error_without_either():
    """The README's example, whose last line is meant to fail."""
    (example,) = re.findall(r"```python\n(import os\n.*?)```", README, re.DOTALL)
    line = [sys.executable, "-c", example]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.partition("ValueError: ")[2] in README, done.stderr


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
    assert "rank 0] step    20" in done.stderr
