"""What stage 03 promises: the training of stage 01 on several hosts, and failures that end soon."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lab.hosts import (
    REFERENCE,
    TWO_HOSTS,
    assert_seen,
    descendants,
    finish,
    pid_of_rank,
    root_cause,
    succeed,
    wait_for,
    why_not,
)
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
    same_weights,
    train,
    worst_difference,
)

FOLDER = ROOT / FOLDERS["03"]
BIN = Path(sys.executable).parent
REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

DEAF = ["bash", "-c", 'trap "" USR1; exec "$@"', "-"]  # as the job scripts start torchrun
TIMEOUT = 6  # what the runs that are hurt are given as --timeout


@pytest.fixture
def long(flags, dropout_model, tmp_path):
    """A run that only a failure ends, saved every few steps."""
    more = ["-m", dropout_model, "--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 10]
    return [*flags, *more, "--global-batch-size", 8, "-b", 2, "--timeout", TIMEOUT, "-e", "run"]


def saved_step(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]


def once(path, *runs):
    """Wait until runs have written a file and go on; return the time."""
    wait_for(lambda: path.exists() or any(r.poll() is not None for r in runs), what=str(path))
    time.sleep(0.5)
    assert all(run.poll() is None for run in runs), [run.output.read_text() for run in runs]
    return time.monotonic()


def test_same_loss_curve_on_two_hosts(hosts, flags, alone, tmp_path):
    """And a log of each rank, and a run of wandb."""
    flags += STEPS
    succeed(*hosts.both(*flags, "-b", 1, "-e", "run", processes=2, WANDB_MODE=None))
    succeed(*hosts.both(*flags, "-b", 4, "-e", "one", processes=1))
    for name, world_size in {"run": 4, "one": 2}.items():
        difference = worst_difference(metrics(alone), metrics(tmp_path / name))
        print(f"2 hosts x {world_size // 2}: largest difference {difference:.1e}")
        assert difference < 1e-4
        assert metrics(tmp_path / name)[16]["world_size"] == world_size
    for rank in range(4):
        log = (tmp_path / "run" / f"rank{rank}.log").read_text()
        assert f"[node{1 + rank // 2} rank {rank}] step 16" in log
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == 4


def test_stage_03_continues_what_02_began_and_01_what_03_began(hosts, flags, alone, tmp_path):
    flags += [*STEPS, "-e", "run", "-b", 2]
    train("02", *flags, processes=2, env=recorded(tmp_path / "notes", DIE=1), fails=True)
    assert saved_step(tmp_path / "run") == 8
    assert "step 8 of 16" in succeed(*hosts.both(*flags))[0]
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    assert "step 16 of 18" in train("01", *flags, "--max-steps", 18).stderr


def goes_on_alone(hosts, long, tmp_path):
    """Nothing is lost: what is left of the cluster goes on."""
    step = saved_step(tmp_path / "run")
    run = hosts.torchrun("node1", *long, "--max-steps", step + 10, nnodes="1")
    assert f"step {step} of {step + 10}" in succeed(run)[0]
    assert list(metrics(tmp_path / "run"))[-1] == step + 10


def test_a_killed_rank_is_named_by_the_torchrun_of_its_node(hosts, long, tmp_path):
    """The other hosts say what happened to them."""
    long += ["--timeout", 20]
    runs = hosts.both(*long, processes=2, before=[])
    once(tmp_path / "run" / "checkpoint.pt", *runs)
    # torchrun tells first from later by whole seconds: let none begin between the two.
    wait_for(lambda: time.time() % 1 < 0.3)
    began = time.monotonic()
    os.kill(pid_of_rank(3, start=tmp_path), signal.SIGKILL)
    node1, node2 = finish(*runs, timeout=60)
    print(f"both hosts ended {time.monotonic() - began:.1f} s after the kill")
    assert time.monotonic() - began < 20 + 25 and all(run.returncode for run in runs)
    assert re.search(r"rank +: 3 .*exitcode +: -9 ", root_cause(node2), re.DOTALL), node2
    assert_seen("Signal 9 (SIGKILL) received by PID", root_cause(node2))
    for text in ("Sending process", "closing signal SIGTERM"):
        assert_seen(text, node1 + node2)
    closed = ["Connection closed by peer [", "Connection reset by peer"]
    # Now and then gloo does not see that a connection has been closed, and waits for the timeout.
    texts = "|".join(map(re.escape, [*closed, "Timed out waiting "]))
    assert re.search(f"RuntimeError: .*({texts})", root_cause(node1)), node1
    assert all(text in REFERENCE.read_text() for text in closed)
    goes_on_alone(hosts, long, tmp_path)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(hosts, long, tmp_path):
    long += ["--max-steps", 40]
    runs = hosts.both(*long)
    wait_for((tmp_path / "run" / "checkpoint.pt").exists)
    os.kill(runs[1].pid(rank=0), signal.SIGKILL)
    finish(*runs)
    assert saved_step(tmp_path / "run") < 40 and all(run.returncode for run in runs)
    succeed(*hosts.both(*long))
    succeed(*hosts.both(*long, "-e", "whole"))
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run")) == 0


def test_a_frozen_rank_ends_all_in_time(hosts, long, tmp_path):
    runs = hosts.both(*long, options=["--shutdown-timeout", 8])
    began = once(tmp_path / "run" / "checkpoint.pt", *runs)
    os.kill(runs[1].pid(rank=0), signal.SIGSTOP)
    node1, node2 = finish(*runs, timeout=60)
    print(f"both hosts ended {time.monotonic() - began:.1f} s after the freeze")
    assert time.monotonic() - began < TIMEOUT + 8 + 15 and all(run.returncode for run in runs)
    assert_seen("Timed out waiting ", root_cause(node1))
    # torchrun's SIGTERM is not heard there; --shutdown-timeout later comes SIGKILL. Meanwhile node1
    # has ended, and the store with it.
    for text in (
        "Unable to shutdown process",
        "forcefully exiting via 9",
        "has failed to send a keep-alive heartbeat",
        "Failed to recv, got 0 bytes. Connection was likely closed",
    ):
        assert_seen(text, node2)
    goes_on_alone(hosts, long, tmp_path)


DDP_ALONE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
"""


@pytest.mark.slow
def test_torch_names_a_silent_rank_if_asked_to_but_not_with_ddp_on_gloo(hosts, long, tmp_path):
    """Rank 1 stops between two collectives: after its first optimizer step."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        "    register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))\n"
    )
    env = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    script, more = FOLDER / "train_llm_sharded.py", {"PYTHONPATH": tmp_path, "before": []}
    runs = hosts.both(*long, "--timeout", 2 * TIMEOUT, script=script, **more, **env)
    (node1,) = finish(runs[0], timeout=120)
    assert runs[0].returncode != 0
    assert "RuntimeError: [Rank 0]: Ranks 1 failed to pass monitoredBarrier" in root_cause(node1)
    assert_seen("failed to pass monitoredBarrier", node1)
    # With DDP torch 2.13 crashes, where DDP notes which interface gloo has.
    done = subprocess.run([sys.executable, "-c", DDP_ALONE], env=environment(**env))
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["OFF", "DETAIL"])
@pytest.mark.parametrize("fault", ["sleep", "skip", "other"])
def test_the_hang_lab_shows_what_its_table_says(hosts, tmp_path, fault, debug):
    page = (FOLDER / "README.md").read_text()
    program = tmp_path / "hang.py"
    program.write_text(re.search(r"as `hang.py`.*?```python\n(.*?)```", page, re.DOTALL)[1])
    env = {"TORCH_FR_BUFFER_SIZE": 100, "TORCH_DISTRIBUTED_DEBUG": debug}
    # before: not forked, because torch reads the variable while it is imported
    runs = hosts.both(fault, script=program, before=["env"], **env)
    output = "".join(finish(*runs, timeout=60))
    assert all(run.returncode for run in runs), output
    (row,) = re.findall(rf"^\| `{fault}` \|(.*)$", page, re.MULTILINE)
    said, recorder, detail = row.strip("|").split(" | ")
    for promise in [detail] if debug == "DETAIL" else [said, recorder]:
        for rank, text in re.findall(r"(rank \d: |)`([^`]+)`", promise):
            # torch puts the rank before each line of a traceback in another way
            assert (rank + text if "entered" in text else text) in output, output
    if fault == "skip":
        assert "rank 1: step 3, total 8" in output and "rank 0: step 3, total 16" in output


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["host without power", "cut link"])
def test_silence_ends_all_in_time(hosts, long, tmp_path, fault):
    long += ["--timeout", 2 * TIMEOUT]
    runs = hosts.both(*long, before=[])
    began = once(tmp_path / "run" / "checkpoint.pt", *runs)
    if fault == "host without power":
        hosts("off", "node2")
    else:
        # The kernel tells torchrun that its connection is dead after 15 minutes, here after 15 s.
        hosts("run", "node2", "sysctl", "-qw", "net.ipv4.tcp_retries2=5")
        hosts("cut")
    (node1,) = finish(runs[0], timeout=60)
    print(f"{fault}: node1 ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 2 * TIMEOUT + 25
    assert_seen("Timed out waiting ", root_cause(node1))
    (node2,) = finish(runs[1], timeout=90)
    print(f"{fault}: node2 ended after {time.monotonic() - began:.1f} s")
    assert all(run.returncode for run in runs)
    if fault == "cut link":
        assert re.search("RuntimeError: .*Timed out waiting ", node2), node2
    hosts("heal") if fault == "cut link" else hosts("up")
    goes_on_alone(hosts, long, tmp_path)


@pytest.mark.slow
def test_shrinks_to_one_host_and_grows_back_along_the_same_curve(hosts, long, model, tmp_path):
    long += ["-m", model]
    elastic = {"nnodes": "1:2", "options": ["--max-restarts", 3]}
    elastic["options"] += ["--rdzv-conf", "last_call_timeout=3"]
    runs = hosts.both(*long, **elastic)
    once(tmp_path / "run" / "checkpoint.pt", *runs)

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
    at = long.index("--timeout")
    alone = fork(command("01", *long[:at], *long[at + 2 :], "-e", "alone")[1:])
    path = tmp_path / "alone" / "metrics.jsonl"
    wait_for(lambda: path.exists() and f'"step": {last},' in path.read_text())
    alone.kill()
    reference = {step: row for step, row in metrics(tmp_path / "alone").items() if step in run}
    assert worst_difference(reference, run, keys=["loss", "grad_norm"]) < 1e-4


def saved_and_stopped_by(name, output, tmp_path):
    """All ranks have stopped at one step, which rank 0 has saved."""
    (step,) = re.findall(rf"stopped by {name} after step (\d+)", output)
    logs = [path.read_text() for path in tmp_path.glob("run/rank*.log")]
    assert all(f"stopped by {name} after step {step}" in log for log in logs), logs
    *_, last = metrics(tmp_path / "run").values()
    assert saved_step(tmp_path / "run") == last["step"] == int(step)
    assert "val_loss" not in last  # no time


@pytest.mark.parametrize(
    "number, rank, code",
    [(signal.SIGTERM, 0, 1), (signal.SIGUSR1, 0, 0), (signal.SIGTERM, None, 1)],
    ids=["SIGTERM to a rank", "SIGUSR1 to a rank", "SIGTERM to a torchrun"],
)
def test_a_signal_saves_and_stops_all_at_one_step(hosts, long, tmp_path, number, rank, code):
    runs = hosts.both(*long, "--ckpt-freq", 100_000, processes=2)
    began = once(tmp_path / "run" / "metrics.jsonl", *runs)
    os.kill(runs[1].pid(rank), number)
    outputs = finish(*runs, timeout=30)
    assert time.monotonic() - began < 15
    assert [bool(run.returncode) for run in runs] == [bool(code)] * 2, outputs
    saved_and_stopped_by(number.name, outputs[0], tmp_path)


def test_a_torchrun_that_is_deaf_to_sigusr1_lets_its_ranks_hear_it(hosts, long, tmp_path):
    """As under Slurm, which sends its warning to all processes of a job step."""
    runs = hosts.both(*long, "--ckpt-freq", 100_000, "--timeout", 60, before=DEAF)
    once(tmp_path / "run" / "metrics.jsonl", *runs)
    for host in ("node1", "node2"):
        hosts("run", host, "pkill", "-USR1", "-f", FOLDER / "train_llm.py")
    outputs = succeed(*runs, timeout=30)
    saved_and_stopped_by("SIGUSR1", outputs[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["03", "sharded", "04"])
def test_a_late_warning_kills_nobody(flags, tmp_path, stage):
    """A job script warns every 30 s, here every 5 ms, until the last process has gone. In processes
    of their own: the end of one that has been forked is not Python's."""
    more = ["-e", "run", "--max-steps", 100_000, "--log-freq", 1]
    line = command(stage, *flags, *more, processes=1)
    with open(tmp_path / "output", "w") as file:
        run = subprocess.Popen([*DEAF, *line], env=environment(), stdout=file, stderr=file)
    once(tmp_path / "run" / "metrics.jsonl", run)
    warnings = 0
    while run.poll() is None:
        for pid in descendants(run.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        warnings += 1
        time.sleep(0.005)
    output = (tmp_path / "output").read_text()
    assert run.returncode == 0 and "stopped by SIGUSR1 after step" in output, output
    assert warnings > 10


def mount(hosts, other, path):
    hosts("run", "node2", "mount", "--bind", other, path)


def other_flag(hosts, **_):
    return ["--lr", 0.5]


def other_script(hosts, tmp_path, **_):
    changed = tmp_path / "changed.py"
    changed.write_text((FOLDER / "train_llm.py").read_text() + "# changed\n")
    mount(hosts, changed, FOLDER / "train_llm.py")


def other_data(hosts, tmp_path, corpus, **_):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((corpus / "corpus.jsonl").read_text().splitlines(True)[:200]))
    mount(hosts, few, corpus / "corpus.jsonl")


def not_shared(hosts, tmp_path, **_):
    (tmp_path / "run").mkdir()
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "run")


def older_checkpoint(hosts, tmp_path, flags, **_):
    """As behind a disk's cache that is late; here by mounting the old file over the new one."""
    for steps in (2, 3):
        succeed(*hosts.both(*flags, "--max-steps", steps))
        (tmp_path / f"{steps}.pt").write_bytes((tmp_path / "run" / "checkpoint.pt").read_bytes())
    mount(hosts, tmp_path / "2.pt", tmp_path / "run" / "checkpoint.pt")


def other_training(hosts, flags, **_):
    succeed(*hosts.both(*flags, "--max-steps", 2))
    flags += ["--seed", 7]


def rest_of_a_batch(hosts, flags, **_):
    flags += ["--global-batch-size", 9]


HERE = "on node1, but"
SILENT_FAULTS = {
    other_flag: rf"--lr is 0.001 {HERE} 0.5 on node2",
    other_script: rf"train_llm.py is \w{{12}} {HERE} \w{{12}} on node2",
    other_data: rf"the data is \d+ rows \w{{12}} {HERE} \d+ rows \w{{12}} on node2",
    not_shared: rf"\S+/run/started is .* {HERE} not there on node2",
    older_checkpoint: rf"the step to go on from is 3 {HERE} 2 on node2",
    other_training: r"--seed was 0 when \S+ was written and is 7 now: put the old value back, .*",
    rest_of_a_batch: r"--global-batch-size 9 is no multiple of --batch-size 4 x 2 ranks",
}


@pytest.mark.parametrize("fault", SILENT_FAULTS, ids=lambda fault: fault.__name__)
def test_what_would_go_wrong_silently_ends_all_before_the_first_step(
    hosts, flags, corpus, tmp_path, fault
):
    flags += ["-b", 4, "-e", "run"]
    on_node2 = fault(hosts=hosts, flags=flags, corpus=corpus, tmp_path=tmp_path)
    rows = tmp_path / "run" / "metrics.jsonl"
    before = rows.read_text() if rows.exists() else ""
    runs = [hosts.torchrun("node1", *flags), hosts.torchrun("node2", *flags, *(on_node2 or []))]
    outputs = finish(*runs, timeout=60)
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode != 0
        (line,) = re.findall("^error: (.*)", output, re.MULTILINE)
        assert re.fullmatch(SILENT_FAULTS[fault], line), line
    assert (rows.read_text() if rows.exists() else "") == before, "no step was made"


# What torchrun says when the hosts do not find each other. A row: options of torchrun, those that
# only node2 has, and what node1 and node2 must say (one of several, where it depends on the time).
NOBODY = ["failed to connect to any network address of ("]
NOBODY += ["TCP client failed to connect/validate to host"]


def endpoint(name, **conf):
    """Options for a torchrun that does not wait as long as it would without them."""
    conf = ",".join(f"{key}={value}" for key, value in conf.items())
    return ["--rdzv-endpoint", name, *(["--rdzv-conf", conf] if conf else [])]


def own_names_are_loopback(hosts):
    """Debian's usual /etc/hosts: each host knows the other's address, and not its own."""
    for name, other, address in (("node1", "node2", 2), ("node2", "node1", 1)):
        lines = f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{address} {other}\n"
        hosts("run", name, "sh", "-c", 'printf "$0" > /etc/hosts', lines)


def test_an_endpoint_that_is_nowhere(hosts, flags):
    """Its name unknown, its address nobody's, or without the name of the host that should serve."""
    own_names_are_loopback(hosts)
    places = {"node9:29500": ["cannot be retrieved (gai error: -2"], "10.77.0.9:29500": NOBODY}
    places["10.77.0.1:29500"] = ["The client socket has timed out after"]
    runs = [
        hosts.torchrun("node1", *flags, options=endpoint(name, read_timeout=4)) for name in places
    ]
    for run, output, texts in zip(runs, finish(*runs), places.values(), strict=True):
        assert run.returncode != 0
        assert_seen("RendezvousConnectionError", output)
        assert any(text in output for text in texts), output
        assert all(text in REFERENCE.read_text() for text in texts)


def test_a_host_name_that_is_loopback(hosts, flags):
    own_names_are_loopback(hosts)
    runs = hosts.both(*flags, "--timeout", TIMEOUT)
    wait_for(lambda: any(run.poll() is not None for run in runs), what="the first one ends")
    output = "".join(run.output.read_text() for run in runs)
    assert_seen("Gloo connectFullMesh failed", output)
    assert_seen("remote=[127.0.1.1]", output)


def test_an_interface_that_is_not_there(hosts, flags):
    outputs = finish(*hosts.both(*flags, GLOO_SOCKET_IFNAME="eth7"))
    assert_seen("Unable to find address for: ", root_cause(outputs[0]))


def test_a_blocked_port_a_missing_node_and_another_job_on_the_port(hosts, flags):
    """Three clusters at once, as they only wait."""
    rule = ["to", "10.77.0.1", "ipproto", "tcp", "dport", "29500", "unreachable", "priority", "1"]
    hosts("run", "node2", "ip", "rule", "add", *rule)
    blocked = hosts.both(*flags, options=endpoint("node1:29500", read_timeout=4, join_timeout=8))
    first = hosts.torchrun("node1", *flags, options=endpoint("node1:29501", join_timeout=12))
    other = [*endpoint("node1:29501", join_timeout=4), "--rdzv-id", "other"]
    second = hosts.torchrun("node2", *flags, options=other)
    outputs = finish(*blocked, first, second)
    for output in (outputs[0], *outputs[2:]):
        assert_seen("RendezvousTimeoutError", output)
    assert_seen(NOBODY[0], outputs[1])


def test_a_full_disk_keeps_the_checkpoint_before(hosts, flags, wide_model, tmp_path):
    """On all hosts the same disk, so it is made before them, which takes root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", disk], check=True)
    hosts("down")
    hosts("up")
    try:
        more = ["-m", wide_model, "--save-dir", disk, "-e", "run", "-b", 1, "--ckpt-freq", 3]
        succeed(*hosts.both(*flags, *more, "--max-steps", 3))
        with open(disk / "filler", "wb") as file:
            file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (10 << 20)))
        runs = hosts.both(*flags, *more, "--max-steps", 6, "--timeout", TIMEOUT)
        outputs = finish(*runs)
        assert all(run.returncode for run in runs), outputs
        assert_seen("No space left on device", root_cause(outputs[0]))
        assert saved_step(disk / "run") == 3
    finally:
        hosts("down")
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_plain_python_lacks_what_torchrun_sets(flags):
    done = run_forked([str(FOLDER / "train_llm.py"), *map(str, flags)], 60)
    assert done.returncode == 1
    assert_seen("KeyError: 'RANK'", done.stderr.splitlines()[-1])


def test_processes_per_gpu_without_a_gpu():
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu", "script.py"]
    done = run_forked(line, 60)
    assert done.returncode == 1
    assert_seen("Cuda is not available", done.stderr.splitlines()[-1])


def test_every_error_that_the_reference_calls_tried_is_tried_here():
    tests = [Path(__file__), Path(__file__).with_name("test_04_manual_spawn.py")]
    source = "".join(path.read_text() for path in tests)
    rows = [line for line in REFERENCE.read_text().splitlines() if line.endswith("| tried |")]
    assert len(rows) >= 20
    for row in rows:
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            assert text in source, text


def preflight(hosts, tmp_path, *flags, **options):
    """Start check_cluster.py on both hosts."""
    more = ["--save-dir", tmp_path / "outputs", "--largest", 1e6, "--timeout", 20]
    return hosts.both(*more, *flags, script=FOLDER / "check_cluster.py", **options)


def problems_of(runs, number):
    """Return what a preflight of a bad cluster has printed: so many problems, each with a cure."""
    output = "".join(finish(*runs))
    assert [run.returncode for run in runs] == [1, 1], output
    assert output.count("cure: ") == output.count("PROBLEM: ") == number, output
    return output


def test_two_preflights_at_once_of_a_good_cluster(hosts, tmp_path):
    runs = preflight(hosts, tmp_path, "--parameters", 2e6, processes=2)
    runs += preflight(hosts, tmp_path, options=endpoint("node1:29501"))
    output = "".join(succeed(*runs))
    assert "fit to train: 4 ranks on 2 hosts" in output
    assert re.search(r"^3 +node2 +10.77.0.2 +eth0 +CPU", output, re.MULTILINE)
    for kind in ("all ranks", "inside a host", "between hosts"):
        assert re.search(rf"all-reduce, {kind}: 1024 bytes in [\d,]+ us; .* GB/s", output)
    assert "gradients of 2 M parameters (8 MB in fp32)" in output
    report = json.loads((tmp_path / "outputs" / "check_cluster.json").read_text())
    assert report["problems"] == [] and len(report["ranks"]) in (2, 4)
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["check_cluster.json"]


def test_the_preflight_finds_a_wrong_name_a_wrong_disk_and_other_versions(hosts, tmp_path):
    """What a package says of itself is enough to try this: a second torch is 200 MB."""
    own_names_are_loopback(hosts)
    (tmp_path / "outputs").mkdir()
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "outputs")
    packages = ["torch", "transformers", "datasets", "wandb"]
    for name in packages:
        info = tmp_path / "other" / f"{name}-9.9.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
        (info / "METADATA").write_text(text)
    path = tmp_path / "other" / "sitecustomize.py"
    path.write_text(
        f"import platform, socket, sys\n"
        "if socket.gethostname() == 'node2':\n"
        f"    sys.path.insert(0, {str(path.parent)!r})\n"
        "    platform.python_version = lambda: '3.99.9'\n"
    )
    output = problems_of(preflight(hosts, tmp_path, PYTHONPATH=path.parent), 8)
    for host in ("node1", "node2"):
        assert f"{host} resolves its own name to 127.0.1.1, where no other host can" in output
    assert "not the disk of rank 0" in output
    for name in packages:
        assert re.search(rf"PROBLEM: {name}: [0-9]\S+ on node1; 9.9 on node2", output)
    assert "3.99.9 on node2" in output


def test_the_preflight_finds_a_wrong_interface_and_a_full_disk(hosts, tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    for host in ("node1", "node2"):
        hosts("run", host, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    output = problems_of(preflight(hosts, tmp_path, GLOO_SOCKET_IFNAME="eth7"), 4)
    assert "node2 has no interface eth7 (GLOO_SOCKET_IFNAME); it has lo, eth0" in output
    assert "outputs: 0.0 GB free" in output


def test_the_preflight_finds_gpus_that_torch_cannot_use(tmp_path):
    """With a driver that is too old, NVML counts them all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.device_count = lambda: 2\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", FOLDER / "check_cluster.py"]
    words = map(str, [*words, "--save-dir", tmp_path])
    done = run_forked(list(words), 100, environment(PYTHONPATH=tmp_path))
    said = "PROBLEM: .* has 2 GPUs, which torch 2.* cannot use\n.*a newer driver"
    assert done.returncode == 1 and re.search(said, done.stdout), done.stdout + done.stderr
    assert done.stdout.count("PROBLEM: ") == 1


def test_the_preflight_finds_a_slow_link(hosts, tmp_path):
    hosts("limit", "10mbit")
    output = succeed(*preflight(hosts, tmp_path))[0]
    seconds = [float(ms) / 1000 for ms in re.findall(r"link .*: 1 MB in ([\d.]+) ms", output)]
    assert len(seconds) == 2 and all(0.5 < s < 1.5 for s in seconds), "1 MB over 10 Mbit/s: 0.84 s"


def test_the_preflight_finds_clocks_that_differ(hosts, tmp_path):
    """libfaketime shows node2's processes a clock that is a minute ahead."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None and "CI" not in os.environ:
        pytest.skip("libfaketime is not installed")
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")  # it leaves files there
    fake = ["env", f"LD_PRELOAD={library}", "FAKETIME=+60s"]
    line = ["--save-dir", tmp_path / "outputs", "--largest", 1e6, "--timeout", 20]
    script = FOLDER / "check_cluster.py"
    runs = [hosts.torchrun("node1", *line, script=script)]
    runs += [hosts.torchrun("node2", *line, script=script, before=fake)]
    assert "the clock of node2 is +60 s off rank 0's" in problems_of(runs, 1)


def test_two_hosts_leaves_nothing_behind(hosts, tmp_path):
    hosts.start("node1", "sleep", "1000")
    wait_for(lambda: "1000" in hosts("run", "node1", "ps", "axww").stdout)
    assert "1000" not in hosts("run", "node2", "ps", "axww").stdout, "own process tables"
    assert hosts("run", "node2", "hostname").stdout == "node2\n"
    pids = [int((hosts.state / name).read_text()) for name in ("switch", "node1", "node2")]
    hosts("down")
    assert not hosts.state.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="no process")
    for words, message in {("run", "node1", "true"): "node1 is", ("cut",): "the hosts are"}.items():
        done = hosts(*words, check=False)
        assert done.returncode == 1 and f"error: {message} not running" in done.stdout


def test_who_works_as_root_has_two_hosts_of_his_own(tmp_path):
    env = environment(TMPDIR=tmp_path, SUDO_UID=4242, TWO_HOSTS=None)
    try:
        subprocess.run([TWO_HOSTS, "up"], env=env, check=True, stdin=subprocess.DEVNULL)
        assert [path.name for path in tmp_path.iterdir()] == ["two_hosts-4242"]
    finally:
        subprocess.run([TWO_HOSTS, "down"], env=env, check=True)


def test_the_readme_s_commands_on_two_hosts(hosts, tmp_path):
    """The first block of the README, word for word but for where hosts and caches are."""
    readme = (FOLDER / "README.md").read_text()
    block = re.search(r"```bash\n((?:[^`]*\n)?./two_hosts.sh up\n.*?)```", readme, re.DOTALL)[1]
    hosts("down")
    done = subprocess.run(
        ["bash", "-ec", block],
        cwd=FOLDER,
        env=environment(TWO_HOSTS=tmp_path / "hosts", PATH=f"{BIN}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit to train: 2 ranks on 2 hosts" in done.stdout
    assert "[node1 rank 0] step 100" in done.stderr
