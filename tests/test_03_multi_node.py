"""What stage 03 promises: the training of stage 01 on several hosts, and failures that end soon."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import Hosts, finish, signal_rank, wait_for, why_not
from stages import (
    ROOT,
    STEPS,
    command,
    environment,
    error_line,
    metrics,
    recorded,
    same_weights,
    train,
    worst_difference,
)

BIN = Path(sys.executable).parent
README = (ROOT / "03-multi-node" / "README.md").read_text()
REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

TIMEOUT = 6  # what the runs that are hurt are given as --timeout


@pytest.fixture
def hosts(tmp_path):
    hosts = Hosts(tmp_path)
    hosts("up")
    yield hosts
    hosts.down()


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
    train("02", *flags, processes=2, env=recorded(tmp_path / "notes", DIE=1), fails=True)
    assert saved_step(tmp_path / "run") == 8
    finish(*hosts.both(*flags, processes=1))
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4
    done = train("01", *flags, "--max-steps", 18)
    assert "resuming after step 16" in done.stderr


# What node1 says, and what else a reader may search for.
ECHO = "Timed out waiting "
FAULTS = {
    "killed rank": [
        "a rank has died; first, ",
        "Signal 9 (SIGKILL) received by PID",
        "Sending process",
        "closing signal SIGTERM",
    ],
    "frozen rank": [
        "no answer from rank 3 on node2: ",
        ECHO,
        "no answer from rank",
        "Unable to shutdown process",
        "forcefully exiting via 9",
        "has failed to send a keep-alive heartbeat",
        "Failed to recv, got 0 bytes. Connection was likely closed",
    ],
    "host without power": ["no answer from rank 2 on node2, rank 3 on node2: ", ECHO],
    "cut link": [
        "no answer from rank 2 on node2, rank 3 on node2: ",
        "which holds the store, nor from other ranks",
    ],
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
    assert runs[0].returncode != 0 and FAULTS[fault][0] in survivor, survivor
    (other,) = finish(runs[1], timeout=90)  # a frozen process is killed after torchrun's 30 s
    print(f"{fault}: node2 ended after {time.monotonic() - began:.1f} s")
    assert runs[1].returncode != 0
    for text in FAULTS[fault][1:]:
        assert_seen(text, survivor + other)
    if fault == "killed rank":
        closed = "Connection closed by peer [", "Connection reset by peer"
        assert any(text in survivor for text in closed) and all(text in README for text in closed)
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


def test_a_torchrun_that_is_deaf_to_sigusr1_lets_its_ranks_hear_it(hosts, long, tmp_path):
    """As under Slurm, which sends its warning to all processes of a job step."""
    script = ROOT / "03-multi-node" / "train_llm.py"
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--rdzv-backend", "c10d"]
    line += ["--rdzv-id", "test", "--rdzv-endpoint", "node1:29500", script, *long]
    deaf = ["bash", "-c", 'trap "" USR1; exec "$@"', "-"]
    runs = [hosts.start(host, *deaf, *line) for host in ("node1", "node2")]
    once_saved(tmp_path, *runs)
    for host in ("node1", "node2"):
        hosts("run", host, "pkill", "-USR1", "-f", script)
    outputs = finish(*runs, timeout=30)
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "stopped by SIGUSR1 after step" in outputs[0]
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
    """Run with something else on node2; return {what: how it differs}, as both hosts say it."""
    runs = [hosts.torchrun("node1", *flags)]
    runs += [hosts.torchrun("node2", *flags, *on_node2, **options)]
    outputs = finish(*runs)
    assert all(run.returncode for run in runs), outputs
    assert_seen("error: the ranks must agree", outputs[0])
    tables = [re.findall(r"^ {4}(\S+.*?): (.* on node1; .*)", o, re.MULTILINE) for o in outputs]
    assert tables[0] and tables[0] == tables[1], outputs
    return dict(tables[0])


def test_other_flags_another_script_and_another_version_on_a_node(hosts, flags, tmp_path):
    """What a package says of itself is enough to try this: a second torch is 200 MB."""
    changed = tmp_path / "train_llm.py"
    changed.write_text((ROOT / "03-multi-node" / "train_llm.py").read_text() + "# changed\n")
    info = tmp_path / "other" / "torch-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    other = {"script": changed, "PYTHONPATH": tmp_path / "other"}
    table = disagreement(hosts, flags, ["--lr", 0.5], **other)
    assert table.keys() == {"--lr", "train_llm.py", "torch"}
    assert table["--lr"] == "0.002 on node1; 0.5 on node2"
    assert re.fullmatch(r"\w{12} on node1; \w{12} on node2", table["train_llm.py"])
    assert re.fullmatch(r"2\S+ on node1; 9.9 on node2", table["torch"])


def test_other_data_on_a_node_and_a_save_folder_that_is_not_shared(hosts, flags, corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join((corpus / "corpus.jsonl").read_text().splitlines(True)[:200]))
    hosts("run", "node2", "mount", "--bind", other, corpus / "corpus.jsonl")
    (tmp_path / "outputs").mkdir()
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "outputs")
    table = disagreement(hosts, [*flags, "--save-dir", tmp_path / "outputs", "-e", "run"])
    assert table.keys() == {"data", "--save-dir"}
    assert re.fullmatch(r"(\d+) rows \w+ on node1; (\d+) rows \w+ on node2", table["data"])
    assert table["--save-dir"] == "on the disk of rank 0 on node1; not shared on node2"
    for text in ("data: ", "--save-dir: on the disk of rank 0 on node1; not shared on"):
        assert text in README


def assert_seen(text, output):
    """text is in the output, and a reader who searches for it finds it in the README."""
    assert text in output, output
    assert text in README


def endpoint(name, **conf):
    """Options for a torchrun that does not wait as long as it would without them."""
    conf = ",".join(f"{key}={value}" for key, value in conf.items())
    return {"options": ["--rdzv-endpoint", name, *(["--rdzv-conf", conf] if conf else [])]}


def test_every_error_that_the_readme_calls_tried_is_tried_here():
    source = Path(__file__).read_text()
    rows = [line for line in README.splitlines() if line.endswith("| tried |")]
    assert len(rows) >= 20
    for row in rows:
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            assert text in source, text


def test_plain_python_is_told_to_use_torchrun(flags):
    script = ROOT / "03-multi-node" / "train_llm.py"
    line = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert_seen("error: start this stage with torchrun", error_line(done))


@pytest.mark.parametrize(
    "name, messages",
    [
        ("node9:29500", ["cannot be retrieved (gai error: -2"]),
        # Which one depends on what comes first, the kernel's verdict or the timeout.
        (
            "10.77.0.9:29500",
            [
                "failed to connect to any network address of (",
                "TCP client failed to connect/validate to host",
            ],
        ),
    ],
)
def test_an_endpoint_that_is_nowhere(hosts, flags, name, messages):
    run = hosts.torchrun("node1", *flags, **endpoint(name, read_timeout=4))
    (output,) = finish(run)
    assert run.returncode != 0
    assert any(message in output for message in messages), output
    assert all(message in README for message in messages)
    assert_seen("RendezvousConnectionError", output)


def own_names_are_loopback(hosts):
    """Debian's usual /etc/hosts: each host knows the other's address, and not its own."""
    for name, other, address in (("node1", "node2", 2), ("node2", "node1", 1)):
        lines = f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{address} {other}\n"
        hosts("run", name, "sh", "-c", 'printf "$0" > /etc/hosts', lines)


def test_an_endpoint_in_which_no_host_recognises_itself(hosts, flags):
    own_names_are_loopback(hosts)
    conf = endpoint("10.77.0.1:29500", read_timeout=3)
    output = finish(hosts.torchrun("node1", *flags, **conf))[0]
    assert_seen("The client socket has timed out after", output)


def test_a_host_name_that_is_loopback(hosts, flags):
    own_names_are_loopback(hosts)
    runs = hosts.both(*flags)

    def output():
        return "".join(run.output.read_text(errors="replace") for run in runs)

    # The ranks are dealt out anew each time; one of them fails, and the other may wait for it.
    wait_for(lambda: "Gloo connectFullMesh failed" in output(), what="connectFullMesh failed")
    assert_seen("Gloo connectFullMesh failed", output())
    assert_seen("remote=[127.0.1.1]", output())


def test_an_interface_that_is_not_there(hosts, flags):
    runs = hosts.both(*flags, GLOO_SOCKET_IFNAME="eth7")
    outputs = finish(*runs)
    assert_seen("Unable to find address for: ", outputs[0])


def test_a_blocked_port(hosts, flags):
    rule = ["to", "10.77.0.1", "ipproto", "tcp", "dport", "29500", "unreachable", "priority", "1"]
    hosts("run", "node2", "ip", "rule", "add", *rule)
    conf = endpoint("node1:29500", read_timeout=4, join_timeout=8)
    runs = hosts.both(*flags, **conf)
    outputs = finish(*runs)
    assert_seen("RendezvousTimeoutError", outputs[0])
    assert_seen("failed to connect to any network address of (", outputs[1])


def test_a_missing_node_and_another_job_on_the_port(hosts, flags, tmp_path):
    first = hosts.torchrun("node1", *flags, **endpoint("node1:29500", join_timeout=12))
    other = endpoint("node1:29500", join_timeout=4)
    other["options"] += ["--rdzv-id", "other"]
    second = hosts.torchrun("node2", *flags, **other)
    for output in finish(first, second):
        assert_seen("RendezvousTimeoutError", output)


def test_clocks_that_differ(hosts, flags):
    """libfaketime shows node2's processes a clock that is a minute ahead; the training goes on."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None and "CI" not in os.environ:
        pytest.skip("libfaketime is not installed")
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")  # it leaves files there
    first = hosts.torchrun("node1", *flags)
    fake = ["env", f"LD_PRELOAD={library}", "FAKETIME=+60s"]
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--rdzv-backend", "c10d"]
    line += ["--rdzv-id", "test", "--rdzv-endpoint", "node1:29500"]
    hosts.start("node2", *fake, *line, ROOT / "03-multi-node" / "train_llm.py", *flags)
    wait_for(lambda: "step    10" in first.output.read_text(), what=first.output)
    assert_seen("the hosts' clocks are", first.output.read_text())
    assert "60 s apart" in first.output.read_text()


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
        finish(*hosts.both(*flags, *more, "--max-steps", 3))
        with open(disk / "filler", "wb") as file:
            file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (10 << 20)))
        runs = hosts.both(*flags, *more, "--max-steps", 6, "--timeout", TIMEOUT)
        outputs = finish(*runs)
        assert all(run.returncode for run in runs), outputs
        assert_seen("No space left on device", outputs[0])
        assert saved_step(disk / "run") == 3
    finally:
        hosts("down")
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_checkpoint_of_another_training(hosts, flags):
    flags += ["-e", "run", "--max-steps", 2]
    finish(*hosts.both(*flags))
    outputs = finish(*hosts.both(*flags, "--seed", 7))
    for text in ("when ", "was written and is ", "now: go on with the old value"):
        assert_seen(text, outputs[0])


def test_a_host_that_sees_an_older_checkpoint(hosts, flags, tmp_path):
    """As behind a disk's cache that is late; here by mounting the old file over the new one."""
    flags += ["-e", "run"]
    finish(*hosts.both(*flags, "--max-steps", 2))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    old = checkpoint.rename(tmp_path / "old.pt")
    checkpoint.write_bytes(old.read_bytes())
    finish(*hosts.both(*flags, "--max-steps", 3))
    hosts("run", "node2", "mount", "--bind", old, checkpoint)
    table = disagreement(hosts, [*flags, "--max-steps", 4])
    assert table == {"step to resume from": "3 on node1; 2 on node2"}
    assert "step to resume from: " in README


def preflight(hosts, tmp_path, *flags, processes=1, **env):
    """Run check_cluster.py on both hosts. Return its exit statuses and what rank 0 printed."""
    script = ROOT / "03-multi-node" / "check_cluster.py"
    folder = tmp_path / "outputs"
    more = ["--save-dir", folder, "--largest", 1e6, "--timeout", 20]
    runs = hosts.both(*more, *flags, script=script, processes=processes, **env)
    outputs = finish(*runs)
    return [run.returncode for run in runs], outputs[0] + outputs[1]


def test_the_preflight_of_a_good_cluster(hosts, tmp_path):
    codes, output = preflight(hosts, tmp_path, "--parameters", 2e6, processes=2)
    assert codes == [0, 0], output
    assert "fit to train: 4 ranks on 2 hosts" in output
    assert re.search(r"^3 +node2 +10.77.0.2 +eth0 +CPU", output, re.MULTILINE)
    for kind in ("all ranks", "inside a host", "between hosts"):
        assert re.search(rf"all-reduce, {kind}: 1024 bytes in [\d,]+ us; .* GB/s", output)
    assert "gradients of 2 M parameters (8 MB in fp32)" in output
    report = json.loads((tmp_path / "outputs" / "check_cluster.json").read_text())
    assert report["problems"] == [] and len(report["ranks"]) == 4
    assert list(tmp_path.glob("outputs/.check_cluster*")) == []


def test_the_preflight_finds_what_is_wrong(hosts, tmp_path):
    own_names_are_loopback(hosts)
    (tmp_path / "outputs").mkdir()
    hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "outputs")
    codes, output = preflight(hosts, tmp_path)
    assert codes == [1, 1], output
    assert "node1 resolves its own name to 127.0.1.1, where no other host can reach it" in output
    assert "not the disk of rank 0" in output
    assert output.count("cure: ") == output.count("PROBLEM: ") == 3


def test_the_preflight_finds_a_wrong_interface_and_a_full_disk(hosts, tmp_path):
    (tmp_path / "outputs").mkdir()
    for host in ("node1", "node2"):
        folder = tmp_path / "outputs"
        hosts("run", host, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    codes, output = preflight(hosts, tmp_path, GLOO_SOCKET_IFNAME="eth7")
    assert codes == [1, 1], output
    assert "node2 has no interface eth7 (GLOO_SOCKET_IFNAME); it has lo, eth0" in output
    assert "outputs: 0.0 GB free" in output


def test_the_preflight_finds_a_slow_link(hosts, tmp_path):
    hosts("limit", "10mbit")
    codes, output = preflight(hosts, tmp_path)
    assert codes == [0, 0], output
    seconds = [float(ms) / 1000 for ms in re.findall(r"link .*: 1 MB in ([\d.]+) ms", output)]
    assert len(seconds) == 2 and all(0.5 < s < 1.5 for s in seconds), "1 MB over 10 Mbit/s: 0.84 s"


def test_two_hosts_leaves_nothing_behind(hosts, tmp_path):
    hosts.start("node1", "sleep", "1000")
    wait_for(lambda: "1000" in hosts("run", "node1", "ps", "ax").stdout)
    assert "1000" not in hosts("run", "node2", "ps", "ax").stdout, "own process tables"
    assert hosts("run", "node2", "hostname").stdout == "node2\n"
    pids = [int((hosts.state / name).read_text()) for name in ("switch", "node1", "node2")]
    hosts("down")
    assert not hosts.state.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="no process")
    done = hosts("run", "node1", "true", check=False)
    assert done.returncode == 1 and "error: node1 is not running" in done.stdout
    done = hosts("cut", check=False)
    assert done.returncode == 1 and "error: the hosts are not running" in done.stdout


def test_the_preflight_refuses_numbers_that_make_no_sense():
    script = ROOT / "03-multi-node" / "check_cluster.py"
    line = [sys.executable, script, "--timeout", "-3"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--timeout -3: must be more than 0" in error_line(done)


def test_the_readme_s_commands_on_two_hosts(hosts, tmp_path):
    """The first block of the README, word for word but for where hosts and caches are."""
    block = re.search(r"```bash\n(./two_hosts.sh up\n.*?)```", README, re.DOTALL)[1]
    hosts("down")
    done = subprocess.run(
        ["bash", "-ec", block],
        cwd=ROOT / "03-multi-node",
        env=environment(TWO_HOSTS=tmp_path / "hosts", PATH=f"{BIN}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit to train: 2 ranks on 2 hosts" in done.stdout
    assert "[node1 rank 0] step   100" in done.stderr
