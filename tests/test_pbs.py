"""What job_scripts/*.pbs promise, on two hosts and a stand-in for OpenPBS (pbs.py)."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import Hosts, signal_rank, wait_for, why_not
from pbs import NODES, PBS
from stages import FOLDERS, ROOT, STEPS, metrics, worst_difference

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

MULTI, SINGLE, MANUAL = "multinode_torchrun.pbs", "singlenode_torchrun.pbs", "manual_spawn.pbs"
FOREVER = ["--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 100_000]


class Jobs(PBS):
    """PBS, a copy of the repository to submit from, and what a run of seconds needs."""

    def __init__(self, hosts, flags):
        super().__init__(hosts, kill_delay=40)  # sites have 10 s; here several tests share 2 cores
        self.repository, self.flags = hosts.folder / "repository", flags
        for folder in ("job_scripts", *FOLDERS.values()):
            shutil.copytree(ROOT / folder, self.repository / folder)
        self.outputs = self.repository / "outputs"

    def submit(self, script, *args, options=(), folder=".", **variables):
        """qsub a script from a folder, with one process per host and the last of args winning."""
        args = " ".join(map(str, [*self.flags, *args]))
        values = {"ARGS": args, "VENV": sys.prefix, "NPROC": 1, "PREFLIGHT": 0}
        values |= {"HF_HOME": os.environ["HF_HOME"], "WANDB_MODE": "disabled"} | variables
        given = ",".join(f"{name}={value}" for name, value in values.items())
        path = script if folder == "job_scripts" else f"job_scripts/{script}"
        small = f"select={1 if script == SINGLE else 2}:ncpus=1:mpiprocs=1"
        self.began = time.monotonic()
        cwd = self.repository / folder
        return self.qsub("-l", small, *options, "-v", given, path, cwd=cwd)

    def has_started(self, run):
        """Wait for the first steps of a run."""
        path = self.outputs / run / "metrics.jsonl"
        before = path.read_text().count("\n") if path.exists() else 0
        wait_for(lambda: path.exists() and path.read_text().count("\n") > before + 1, 120, path)
        print(f"{run}: first steps {time.monotonic() - self.began:.1f} s after qsub")

    def end(self, job, timeout=120):
        """Wait for a job's end; return its exit status and output. It must leave no process."""
        began = time.monotonic()
        status, output = self.wait(job, timeout), self.jobs[job].output.read_text()
        print(f"{job}: exit status {status} after {time.monotonic() - began:.1f} s more\n{output}")
        return status, output

    def left_behind(self):
        return [pid for host in NODES for pid in self.processes(host)]

    def all_gone(self):
        wait_for(lambda: not self.left_behind(), timeout=5, what="all processes have gone")
        return True

    def saved_step(self, run):
        return torch.load(self.outputs / run / "checkpoint.pt", weights_only=True)["step"]

    def last_step(self, run):
        return list(metrics(self.outputs / run))[-1]


@pytest.fixture
def pbs(tmp_path, model, corpus):
    hosts = Hosts(tmp_path)
    hosts("up")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 4, "--global-batch-size", 8]
    pbs = Jobs(hosts, [*flags, "-e", "run"])
    yield pbs
    pbs.close()
    hosts.down()


def test_preflight_then_the_same_loss_curve_from_the_root(pbs, alone):
    job = pbs.submit(MULTI, *STEPS, PREFLIGHT=1, NPROC="")
    pbs.has_started("run")
    status, output = pbs.end(job)
    assert status == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4
    assert re.search("preflight: exit status 0;.*\ntrain: exit status 0;", output)
    assert pbs.all_gone()
    logs = pbs.outputs / "jobs" / job / "run0"
    assert "fit to train: 2 ranks on 2 hosts" in (logs / "node1.preflight.log").read_text()
    assert "step    16  loss" in (logs / "node1.train.log").read_text()
    for host in NODES:  # and a file for each rank
        assert list(logs.glob(f"{host}.train/{job}*/attempt_0/0/stderr.log"))


def test_stopped_before_the_walltime_and_continued_by_a_chained_job(pbs):
    """Time is up when the training begins: the ranks stop as soon as they listen. The chained job
    is of stage 04, so both ways to warn the ranks are tried."""
    options = {"folder": "job_scripts", "STOP_AFTER": 1}
    first = pbs.submit(MULTI, *FOREVER, **options)
    second = pbs.submit(MANUAL, *FOREVER, options=["-W", f"depend=afterok:{first}"], **options)
    status, output = pbs.end(first)
    assert status == 0
    step = pbs.saved_step("run")
    assert f"stopped by SIGUSR1 after step {step};" in output
    status, output = pbs.end(second)
    assert status == 0
    assert pbs.saved_step("run") == pbs.last_step("run") > step
    assert f"stopped by SIGUSR1 after step {pbs.last_step('run')};" in output
    log = (pbs.outputs / "jobs" / second / "run0" / "node1.train.log").read_text()
    assert f"resuming after step {step}\n" in log
    assert pbs.all_gone()


def test_an_array_on_the_same_hosts_one_job_loses_a_rank_the_other_is_deleted(pbs):
    """With wandb, whose processes must go too."""
    array = ["-J", "1-2", "-N", "sweep"]
    lost, deleted = pbs.submit(MULTI, *FOREVER, options=array, WANDB_MODE="offline")
    pbs.has_started("sweep-seed1")
    pbs.has_started("sweep-seed2")
    signal_rank(1, signal.SIGKILL, start="sweep-seed1")
    status, output = pbs.end(lost, timeout=45)
    assert status == 1
    assert re.search(r"^node2.train.log: .*Signal 9 \(SIGKILL\) received", output, re.MULTILINE)
    assert "[node1 rank 0] a rank has died" in output
    pbs.qdel(deleted)
    status, output = pbs.end(deleted, timeout=45)
    assert status == 1 and "stopped by SIGTERM after step" in output
    assert pbs.saved_step("sweep-seed2") == pbs.last_step("sweep-seed2") > 0
    assert pbs.all_gone()
    losses = [metrics(pbs.outputs / f"sweep-seed{seed}")[5]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]


def test_a_rerun_job_continues_with_logs_of_its_own_and_ends_at_the_walltime(pbs):
    job = pbs.submit(MANUAL, *FOREVER, "--ckpt-freq", 10)
    pbs.has_started("run")
    wait_for(lambda: (pbs.outputs / "run" / "checkpoint.pt").exists())
    pbs.qrerun(job)
    pbs.has_started("run")
    log = (pbs.outputs / "jobs" / job / "run1" / "node1.train.log").read_text()
    assert "resuming after step" in log
    pbs.end_of_walltime(job)
    status, output = pbs.end(job)
    assert status == -29 and "stopped by SIGTERM after step" in output
    assert pbs.saved_step("run") == pbs.last_step("run")
    assert pbs.all_gone()


def test_ranks_that_ignore_term_do_not_outlive_the_job(pbs):
    deaf = pbs.repository / "deaf.py"
    deaf.write_text(
        "import signal, socket, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{socket.gethostname()}.started', 'w')\n"
        "time.sleep(600)\n"
    )
    pbs.kill_delay = 2
    job = pbs.submit(MULTI, SCRIPT="deaf.py")
    wait_for(lambda: all((pbs.repository / f"{host}.started").exists() for host in NODES))
    assert len(pbs.left_behind()) >= 8
    pbs.qdel(job)
    assert pbs.end(job)[0] == 265
    assert pbs.all_gone()


def test_a_host_that_fails_alone_ends_the_job(pbs):
    """The other waits for it at the rendezvous, and would for ten minutes."""
    pbs.hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", f"{sys.prefix}/bin")
    status, output = pbs.end(pbs.submit(MULTI))
    assert status != 0
    assert f"error: VENV={sys.prefix}: no bin/torchrun in it" in output
    assert pbs.all_gone()


def test_a_failed_preflight_stops_the_job(pbs):
    """And a variable of qsub -v is known on all hosts."""
    status, output = pbs.end(pbs.submit(MULTI, PREFLIGHT=1, GLOO_SOCKET_IFNAME="eth7"))
    assert status == 1 and "train:" not in output
    assert "PROBLEM: node2 has no interface eth7 (GLOO_SOCKET_IFNAME)" in output
    assert not (pbs.outputs / "run").exists()


@pytest.mark.parametrize(
    "script, options, variables, line",
    [
        (MULTI, ["-l", "place=free"], {}, "this job is for 2 hosts (NODES) and got 1: node1. Ask"),
        (SINGLE, ["-l", "select=2:ncpus=1", "-l", "place=scatter"], {}, "is for one host and got"),
        (MULTI, [], {"SCRIPT": "nope.py"}, "SCRIPT=nope.py: not in"),
        (SINGLE, [], {"VENV": "/nope"}, "VENV=/nope: no bin/torchrun in it"),
        (MANUAL, [], {"STOP_AFTER": "55m"}, "'55m' is not a whole number"),
    ],
)
def test_one_clear_line(pbs, script, options, variables, line):
    status, output = pbs.end(pbs.submit(script, options=options, **variables))
    assert status == 1
    assert [text for text in output.splitlines() if "error: " in text] == output.splitlines()
    assert line in output


def test_one_host(pbs, alone):
    job = pbs.submit(SINGLE, *STEPS, NPROC=2)
    pbs.has_started("run")
    assert pbs.end(job)[0] == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4
    assert pbs.all_gone()


def test_one_host_is_asked_to_stop(pbs):
    script = "03-multi-node/train_llm.py"
    job = pbs.submit(SINGLE, *FOREVER, "-b", 8, SCRIPT=script, NPROC="", PREFLIGHT=1)
    pbs.has_started("run")
    pbs.qdel(job)
    status, output = pbs.end(job, timeout=45)
    assert status == 1 and "stopped by SIGTERM after step" in output
    assert pbs.saved_step("run") == pbs.last_step("run")
    assert pbs.all_gone()


def test_manual_spawn(pbs, alone):
    job = pbs.submit(MANUAL, *STEPS, PREFLIGHT=1)
    pbs.has_started("run")
    assert pbs.end(job)[0] == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4
    failing = pbs.submit(MANUAL, *FOREVER, "-e", "failing")
    pbs.has_started("failing")
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pbs.processes("node2")}
    (rank,) = [pid for pid in words if b"spawn_main" in words[pid]]
    os.kill(rank, signal.SIGKILL)
    status, output = pbs.end(failing, timeout=60)
    assert status not in (0, None)
    assert "[node2 launcher] rank 1 has failed: process 0 terminated with signal SIGKILL" in output
    assert pbs.all_gone()
