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
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab.hosts import assert_seen, children, finish, wait_for, why_not
from lab.stages import (
    FOLDERS,
    ROOT,
    STEPS,
    command,
    environment,
    fork,
    metrics,
    recorded,
    run_forked,
    train,
    worst_difference,
)

SCRIPT = ROOT / FOLDERS["04"] / "train_llm.py"
README = (SCRIPT.parent / "README.md").read_text()
BIN = Path(sys.executable).parent
REASON = why_not()
needs_hosts = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

TIMEOUT = 6


def run(*flags, processes=1, fails=False, **env):
    """Run stage 04 to its end. The launcher is forked; its processes start as the reader's do."""
    line = command("04", *flags, processes=processes)[1:]
    done = run_forked(line, 180, environment(**env))
    assert (done.returncode != 0) == fails, done.stderr
    return done


def last_line(text):
    return text.strip().splitlines()[-1]


@needs_hosts
def test_same_loss_curve_on_two_hosts_also_if_node_0_comes_last(hosts, flags, alone, tmp_path):
    flags += [*STEPS, "-b", 1, "-e", "run"]
    second = hosts.spawn("node2", 1, *flags, processes=2)
    network = Path("/proc", (hosts.state / "node1").read_text().strip(), "net", "snmp")

    def refused():
        names, values = re.findall("^Tcp: (.*)", network.read_text(), re.MULTILINE)
        return int(dict(zip(names.split(), values.split(), strict=True))["OutRsts"]) > 0

    wait_for(refused, what="node2 asks node1, which does not listen yet")
    first = hosts.spawn("node1", 0, *flags, processes=2)
    outputs = finish(first, second)
    assert [first.returncode, second.returncode] == [0, 0], outputs
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"2 hosts x 2: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 4
    assert "[node2 rank 3] step 16" in (tmp_path / "run" / "rank3.log").read_text()


def test_same_loss_curve_and_both_ways_to_say_the_world_size(flags, alone, tmp_path):
    """From the environment it is on the two hosts above."""
    more = ["-b", 4, "-e", "run", "--world-size-from", "args"]
    run(*flags, *STEPS, *more, processes=2, WANDB_MODE=None)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 2
    assert "rank 1] step 16" in (tmp_path / "run" / "rank1.log").read_text()
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == 2


def test_checkpoints_and_rows_move_between_the_stages(flags, alone, tmp_path):
    """The rows though spawn runs the file under another name, and `datasets` goes by names."""
    flags += [*STEPS, "-e", "run", "-b", 4]
    train("03", *flags, processes=2, env=recorded(tmp_path / "notes", DIE=1), fails=True)
    rows = sorted(Path(os.environ["HF_HOME"]).rglob("*.arrow"))
    assert rows and "step 8 of 16" in run(*flags).stderr
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*.arrow")) == rows
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    assert "step 16 of 18" in train("02", *flags, "--max-steps", 18).stderr


@pytest.fixture
def long(flags, dropout_model, tmp_path):
    """A run that only its end by force ends."""
    more = ["-m", dropout_model, "--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 100_000]
    return [*flags, *more, "-b", 2, "--timeout", 60, "-e", "run"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def catches(pid, number):
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) & 1 << (number - 1))


def signalled(flags, tmp_path, number, whom, ready):
    """Start two ranks, and send a signal once they are ready. Return status and output."""
    output = tmp_path / "output"
    launcher = fork(command("04", *flags, processes=2)[1:], (output, output))
    wait_for(lambda: catches(launcher.pid, signal.SIGUSR1), what="its ranks have been started")
    ranks = children(launcher.pid)
    wait_for(ready, what=output)
    pids = {"launcher": [launcher.pid], "rank 1": ranks[1:], "all": [launcher.pid, *ranks]}[whom]
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, number)
    launcher.join(60)
    try:
        wait_for(lambda: not any(map(is_running, ranks)), timeout=60, what="all have ended")
    finally:
        for pid in filter(is_running, ranks):
            os.kill(pid, signal.SIGKILL)
    print(f"{number.name} to {whom}: all ended after {time.monotonic() - began:.1f} s")
    return launcher.exitcode, output.read_text()


@pytest.mark.parametrize(
    "number, whom, code, last",
    [
        (signal.SIGTERM, "launcher", 1, "terminated with exit code 143"),
        (signal.SIGUSR1, "launcher", 0, ""),
        (signal.SIGINT, "all", 1, "terminated with signal SIGINT"),
        (signal.SIGKILL, "launcher", -9, ""),
        (signal.SIGKILL, "rank 1", 1, "process 1 terminated with signal SIGKILL"),
    ],
)
def test_no_process_is_left_behind(long, tmp_path, number, whom, code, last):
    rows = tmp_path / "run" / "metrics.jsonl"
    ready = lambda: rows.exists() and rows.read_text().count("\n") > 1  # noqa: E731
    status, output = signalled(long, tmp_path, number, whom, ready)
    assert status == code, output
    assert last in last_line(output), output
    if number in (signal.SIGTERM, signal.SIGUSR1):
        (step,) = re.findall(rf"stopped by {number.name} after step (\d+)", output)
        *_, last = metrics(tmp_path / "run").values()
        assert last["step"] == int(step) and "val_loss" not in last
        assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_launcher_that_ends_before_the_training_leaves_nobody(long, tmp_path, number):
    status, output = signalled(long, tmp_path, number, "launcher", ready=lambda: True)
    assert status != 0 and not (tmp_path / "run").exists(), output


def test_an_exception_is_shown_with_its_traceback_and_ends_all(flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'spawn_main' in str(sys.orig_argv):\n"
        "    import torch\n"
        "    def clip(*args):\n"
        "        if os.environ['RANK'] == '1': raise ValueError('planted')\n"
        "        return torch.zeros(())\n"
        "    torch.nn.utils.clip_grad_norm_ = clip\n"
    )
    done = run(*flags, processes=2, PYTHONPATH=tmp_path, fails=True)
    assert last_line(done.stderr) == "ValueError: planted"
    assert "-- Process 1 terminated with the following error:" in done.stderr
    assert re.search(r"train_llm.py\", line \d+, in main", done.stderr)


@pytest.mark.slow
@needs_hosts
def test_a_lost_node_ends_the_other_in_time(hosts, long, tmp_path):
    long += ["--timeout", 2 * TIMEOUT]
    runs = [hosts.spawn(f"node{node_rank + 1}", node_rank, *long) for node_rank in (0, 1)]
    rows = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: rows.exists() and rows.read_text().count("\n") > 1, what=rows)
    began = time.monotonic()
    hosts("off", "node2")
    (output,) = finish(runs[0], timeout=60)
    print(f"node1 ended {time.monotonic() - began:.1f} s after node2 had lost power")
    assert runs[0].returncode == 1 and time.monotonic() - began < 2 * TIMEOUT + 20
    assert re.search("RuntimeError: .*Timed out waiting", last_line(output)), output


@needs_hosts
def test_a_node_rank_that_is_there_twice_ends_all_in_time(hosts, flags):
    """Torch gives who asks for the store the timeout twice."""
    flags += ["--timeout", TIMEOUT]
    zeros = [hosts.spawn(host, 0, *flags) for host in ("node1", "node2")]
    ones = [hosts.spawn(host, 1, *flags, "--master-port", 29600) for host in ("node1", "node2")]
    outputs = finish(*zeros, *ones, timeout=90)
    assert all(run.returncode for run in (*zeros, *ones)), outputs
    last = [last_line(output) for output in outputs]
    assert re.search(
        r"Timed out after \d+ seconds waiting for clients. 1/2 clients joined", last[0]
    )
    assert_seen("Cannot assign requested address", last[1])
    for line in last[2:]:
        assert_seen("The client socket has timed out after", line)


def test_a_port_that_is_taken_is_said_at_once_and_not_replaced(flags):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(*flags, "--master-port", port, processes=2, fails=True)
        by_hand = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
        env = environment(RANK=0, LOCAL_RANK=0, **by_hand)
        script = ROOT / FOLDERS["03"] / "train_llm.py"
        stage_03 = run_forked([str(script), *map(str, flags)], 60, env)
    assert_seen("Address already in use", last_line(done.stderr))
    assert_seen("EADDRINUSE", last_line(stage_03.stderr))


@pytest.fixture(scope="module")
def stage():
    """The script as a module: what it does before it starts a process needs none."""
    spec = importlib.util.spec_from_file_location("stage_04", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launched(stage, monkeypatch):
    """Start the script with flags and variables; return what it hands to mp.spawn, which does
    nothing here, or what it exits with."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = [signal.getsignal(number) for number in numbers]

    def launched(line, **env):
        handed = []
        nothing = SimpleNamespace(processes=[], join=lambda: True)
        monkeypatch.setattr(stage.mp, "spawn", lambda *what, **_: handed.append(what) or nothing)
        monkeypatch.setattr(sys, "argv", ["train_llm.py", *line.split()])
        for name in list(os.environ):
            if name.startswith(("SLURM_", "PBS_", "PMI_", "PALS_", "OMPI_", "MASTER_")):
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        try:
            stage.launch(stage.parse_args())
        except SystemExit as error:
            return str(error)
        ((_, (args,), processes),) = handed
        assert processes == args.nproc_per_node
        return args

    yield launched
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_ranks_are_complete_and_in_order_for_any_cluster(stage, launched, monkeypatch):
    """`worker` itself counts; instead of training it writes down what it has counted."""
    names, found = ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"], []
    monkeypatch.setattr(stage, "main", lambda _: found.append([os.environ[n] for n in names]))
    launcher = SimpleNamespace(is_alive=lambda: True)  # here nobody has started this process
    monkeypatch.setattr(stage.mp, "parent_process", lambda: launcher)
    for name in names:
        monkeypatch.setenv(name, "")  # to have it taken back
    for nnodes, nproc in itertools.product(range(1, 18), range(1, 18)):
        args = Namespace(nnodes=nnodes, nproc_per_node=nproc, master_addr="n1", master_port=29500)
        found.clear()
        for args.node_rank, local_rank in itertools.product(range(nnodes), range(nproc)):
            stage.worker(local_rank, args)
        assert found == [
            [str(nnodes * nproc), str(rank), str(rank % nproc), "n1", "29500"]
            for rank in range(nnodes * nproc)
        ]
        for args.node_rank in (-1, nnodes):
            for local_rank in (0, nproc - 1):
                with pytest.raises(AssertionError, match=f"--node-rank {args.node_rank} of"):
                    stage.worker(local_rank, args)


def test_one_process_where_torch_cannot_use_the_gpus(launched, monkeypatch):
    """With a driver that is too old, NVML counts them all the same."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert launched("").nproc_per_node == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert launched("").nproc_per_node == 8


SLURM = {"SLURM_JOB_NUM_NODES": 3, "SLURM_STEP_NUM_NODES": 3, "SLURM_NODEID": 2}
LAUNCHERS = {
    "srun": SLURM,
    "mpiexec of Open MPI": {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 3},
    "mpiexec of MPICH": {"PMI_RANK": 2, "PMI_SIZE": 3},
    "mpiexec of PALS": {"PALS_RANKID": 2, "PMI_SIZE": 3},
    "mpiexec in a Slurm job": {"PMI_RANK": 2, "PMI_SIZE": 3, "SLURM_JOB_NUM_NODES": 3},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_nodes_come_from_the_launcher(launched, launcher):
    args = launched("--master-addr 10.77.0.1", **LAUNCHERS[launcher])
    assert (args.nnodes, args.node_rank, args.master_port) == (3, 2, 29500)
    more = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29501}
    args = launched("--node-rank 1 --nproc-per-node 4", **LAUNCHERS[launcher], **more)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == (3, 1, 4), "flags come first"
    assert (args.master_addr, args.master_port) == ("10.77.0.1", 29501)


def test_under_pbs_the_node_s_rank_is_known_and_their_number_must_be_said(launched, tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\nn1\nn2\nn2\n")
    env = {"PBS_NODEFILE": nodes, "PBS_NODENUM": 1, "MASTER_ADDR": "10.77.0.1"}
    args = launched("--nnodes 2 --nproc-per-node 2", **env)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == (2, 1, 2)
    assert "the job has 2 nodes" in launched("", **env | {"PBS_NODENUM": 0})
    nodes.write_text("n1\nn1\n")
    assert launched("", **env | {"PBS_NODENUM": 0, "MASTER_ADDR": "127.0.0.1"}).nnodes == 1


def test_one_node_takes_a_free_port_of_its_own(launched):
    ports = {launched("").master_port for _ in range(5)}
    assert len(ports) > 1 and launched("").master_addr == "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert launched("", MASTER_PORT=port).master_port == port
    assert launched("", SLURM_JOB_NUM_NODES=1, SLURM_NODEID=0).nnodes == 1
    assert launched("--nnodes 1", SLURM_JOB_NUM_NODES=2, SLURM_NODEID=0).nnodes == 1


UNREACHABLE = "other nodes cannot reach it"
SILENT_FAULTS = [
    ("", {"SLURM_JOB_NUM_NODES": 2}, "error: the job has 2 nodes: start this on"),
    ("", {"SLURM_STEP_NUM_NODES": 1, "SLURM_LOCALID": 1}, "error: start this once per node"),
    ("--nnodes 2", {}, UNREACHABLE),
    ("--nnodes 2 --master-addr=", {}, UNREACHABLE),  # "$NOT_SET"
    ("--nnodes 2", {"MASTER_ADDR": ""}, UNREACHABLE),
    ("--nnodes 2 --node-rank 1 --master-addr localhost", {}, UNREACHABLE),
    ("", SLURM | {"MASTER_ADDR": "127.0.1.1"}, UNREACHABLE),
]


@pytest.mark.parametrize("line, env, message", SILENT_FAULTS)
def test_what_would_go_wrong_silently_starts_no_process(launched, line, env, message):
    error = launched(line, **env)
    assert isinstance(error, str) and re.fullmatch("error: .*", error), error
    assert_seen(message, error)


def test_the_readme_s_messages_are_tried():
    section = README.partition("## When it goes wrong")[2].partition("## Exercises")[0]
    rows = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert rows and all(text in Path(__file__).read_text() for text in rows)


def test_the_readme_s_examples(tmp_path):
    """The smallest launcher, and both ways to say the world size; without either the last line
    fails, and is meant to."""
    examples = re.findall(r"```python\n(import os\n.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    paths = [tmp_path / "launcher.py", tmp_path / "ways.py"]
    for path, example in zip(paths, examples, strict=True):
        path.write_text(example)
    done = run_forked([str(paths[0])], 60)
    assert all(f"rank {rank}: the sum is 3" in done.stdout for rank in range(2)), done
    done = run_forked([str(paths[1])], 60)
    assert done.stdout.split() == ["1", "1"], done.stderr
    error = last_line(done.stderr)
    assert error.partition("ValueError: ")[2] in README, done.stderr


def test_two_terminals_and_the_variables_by_hand():
    """The README's block, word for word."""
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
    assert "rank 0] step 20" in done.stderr
