"""What the job scripts promise, tried on a real Slurm of two nodes and over real ssh."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hosts import finish, signal_rank, wait_for, why_not
from slurm import NODES, Slurm, why_not_slurm
from stages import ROOT, STEPS, metrics, worst_difference

BIN = Path(sys.executable).parent
VENV = BIN.parent if (BIN / "activate").exists() else ""  # where these tests run
REASON = why_not() or why_not_slurm()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

MULTI, SINGLE, MANUAL = (
    f"{name}.sbatch" for name in ("multinode_torchrun", "singlenode_torchrun", "manual_spawn")
)
CPU = ["--gpus-per-node=0", "--cpus-per-task=1"]  # one process per node, with one thread


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    slurm.up()
    yield slurm
    slurm.down()


@pytest.fixture
def repository(tmp_path):
    """A copy, since jobs write their output where they are submitted."""
    copy = tmp_path / "repository"
    for name in (
        "01-single-gpu",
        "02-multi-gpu",
        "03-multi-node",
        "04-manual-spawn",
        "job_scripts",
    ):
        shutil.copytree(ROOT / name, copy / name)
    return copy


@pytest.fixture
def args(model, corpus):
    """ARGS of a run of seconds, which follows stage 01's curve."""

    def line(*more):
        flags = ["-m", model, "-d", corpus / "corpus.jsonl", *STEPS, *more]
        return " ".join(map(str, flags))

    return line


@pytest.fixture
def endless(dropout_model, corpus):
    """ARGS of a run that only a failure or a scheduler ends, saved every few steps."""
    flags = ["-m", dropout_model, "-d", corpus / "corpus.jsonl", "-b", 4, "-e", "run"]
    flags += ["--max-steps", 1_000_000, "--log-freq", 5, "--ckpt-freq", 10, "--timeout", 20]
    return " ".join(map(str, flags))


class Job:
    """A job in the copy of the repository; its numbers are for the report (pytest -rP)."""

    def __init__(self, slurm, repository, script, *options, cwd=None, **env):
        self.slurm, self.began, self.name = slurm, time.time(), script.split("_")[0]
        self.folder, self.run_dir = cwd or repository, repository / "outputs/run"
        script = script if cwd else f"job_scripts/{script}"
        self.number = slurm.submit(script, *options, cwd=self.folder, **{"VENV": VENV} | env)
        self.logs = repository / "outputs/jobs" / self.number

    def output(self):
        path = self.folder / f"{self.name}-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def finish(self):
        """Wait for the end; return state and exit status."""
        (state,) = self.slurm.finish(self.number)
        print(f"{self.name}: {state} after {time.time() - self.began:.0f} s")
        return state

    def wait_for(self, text):
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
        wait_for(
            lambda: text in self.output() or self.slurm.state_of(self.number)[0] in ends,
            what=f"{text} in {self.output()}",
        )
        assert text in self.output(), self.output()

    def once_saved(self):
        """Wait until a checkpoint is there; return the step at which it was made."""
        self.wait_for("step     5")
        print(f"{self.name}: first step logged {time.time() - self.began:.0f} s after sbatch")
        wait_for((self.run_dir / "checkpoint.pt").exists, what="a checkpoint")
        return saved_step(self.run_dir)


def saved_step(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]


def last_step(run_dir):
    return list(metrics(run_dir))[-1]


def nothing_left(slurm, what):
    began = time.monotonic()
    wait_for(lambda: slurm.left_behind() == [], timeout=40, what=slurm.left_behind())
    print(f"{what}: nothing left on the nodes after {time.monotonic() - began:.0f} s")


def test_two_nodes_from_the_root(slurm, repository, args, alone):
    job = Job(slurm, repository, MULTI, *CPU, ARGS=args("-e", "run", "-b", 4))
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert worst_difference(metrics(alone), metrics(job.run_dir)) < 1e-4
    assert metrics(job.run_dir)[16]["world_size"] == 2
    assert "fit to train: 2 ranks on 2 hosts" in job.output()
    for node in NODES:  # of the preflight and of the training
        files = list((job.logs / "attempt0" / node).glob("*/attempt_0/0/stderr.log"))
        assert len(files) == 2 and "[node1 rank 0]" in job.output()
    nothing_left(slurm, "end")


def test_one_node_from_job_scripts_with_a_process_per_gpu(slurm, repository, args, alone):
    """What --export carries: blanks need the shell's quotes, commas would end the value."""
    export = f"--export=ALL,PREFLIGHT=1,ARGS={args('-e', 'run', '-b', 2)}"
    job = Job(
        slurm, repository, SINGLE, "--cpus-per-task=2", export, cwd=repository / "job_scripts"
    )
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert worst_difference(metrics(alone), metrics(job.run_dir)) < 1e-4
    assert metrics(job.run_dir)[16]["world_size"] == 2, "SLURM_GPUS_ON_NODE"
    assert "fit to train: 2 ranks on 1 hosts" in job.output()


def test_an_array_of_seeds_on_shared_nodes(slurm, repository, args, alone):
    """Both tasks run at once on the same two nodes: each has its own port."""
    env = {"VENV": VENV, "PREFLIGHT": 0, "ARGS": args("-b", 4)}
    script = f"job_scripts/{MULTI}"
    array = slurm.submit(script, *CPU, "--array=0-1", cwd=repository, **env)
    tasks = [f"{array}_{index}" for index in (0, 1)]
    wait_for(lambda: slurm.state_of(tasks[1])[0] == "RUNNING", what="task 1 runs")
    assert [slurm.state_of(task)[0] for task in tasks] == ["RUNNING"] * 2, "at once"
    states = slurm.finish(*tasks)
    text = "".join(path.read_text() for path in repository.glob("*.out"))
    assert states == [("COMPLETED", "0:0")] * 2, text
    runs = [metrics(repository / f"outputs/multinode-seed{seed}") for seed in (0, 1)]
    assert worst_difference(metrics(alone), runs[0]) < 1e-4
    assert abs(runs[1][16]["loss"] - runs[0][16]["loss"]) > 1e-4


def test_warning_before_the_time_limit_requeues_and_scancel_saves(slurm, repository, endless):
    # With wandb: a SIGTERM to all processes ends it first.
    job = Job(slurm, repository, MULTI, *CPU, PREFLIGHT=0, ARGS=endless, WANDB_MODE=None)
    job.once_saved()
    # The rest of the time is now less than the 120 s of --signal.
    slurm.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    job.wait_for("stopped by SIGUSR1 after step")
    stopped = int(re.search(r"by SIGUSR1 after step (\d+)", job.output())[1])
    wait_for(lambda: slurm.state_of(job.number)[0] == "PENDING", what="back in the queue")
    assert saved_step(job.run_dir) == stopped
    nothing_left(slurm, "requeue")
    slurm.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.wait_for(f"resuming after step {stopped}\n")
    wait_for(lambda: last_step(job.run_dir) > stopped, what="steps after the requeue")
    assert sorted(path.name for path in job.logs.iterdir()) == ["attempt0", "attempt1"]

    slurm.command("scancel", job.number)
    assert job.finish()[0] == "CANCELLED"
    nothing_left(slurm, "scancel")
    assert saved_step(job.run_dir) == last_step(job.run_dir) > stopped
    # To the file only: torchrun, which passes the output on, hears the signal first.
    logs = (job.logs / "attempt1/node1").glob("*/attempt_0/0/stderr.log")
    assert "stopped by SIGTERM after step" in "".join(path.read_text() for path in logs)


def test_a_dead_rank_fails_the_job_and_the_next_in_the_chain_goes_on(
    slurm, repository, corpus, endless
):
    job = Job(slurm, repository, MULTI, *CPU, PREFLIGHT=0, ARGS=endless)
    after = f"--dependency=afterany:{job.number}"
    chained = Job(slurm, repository, MULTI, *CPU, after, PREFLIGHT=0, ARGS=endless)
    job.once_saved()
    began = time.monotonic()
    signal_rank(1, signal.SIGKILL, start=corpus)
    state, status = job.finish()
    assert state == "FAILED" and status != "0:0", job.output()
    print(f"failed {time.monotonic() - began:.0f} s after the death of the rank")
    assert time.monotonic() - began < 20
    chained.wait_for("resuming after step")
    slurm.command("scancel", chained.number)
    assert chained.finish()[0] == "CANCELLED"
    nothing_left(slurm, "scancel while loading")


def test_a_failed_preflight_ends_the_job_before_training(slurm, repository, args):
    job = Job(slurm, repository, MULTI, *CPU, ARGS=args("-e", "run"), GLOO_SOCKET_IFNAME="eth7")
    state, status = job.finish()
    assert state == "FAILED" and status != "0:0", job.output()
    assert "node2 has no interface eth7 (GLOO_SOCKET_IFNAME)" in job.output()
    assert not job.run_dir.exists()


@pytest.mark.parametrize("script", [MULTI, MANUAL])
def test_a_job_with_fewer_nodes_than_it_is_for(slurm, repository, script):
    """As when the line that asks for them has become a comment."""
    path = repository / "job_scripts" / script
    path.write_text(path.read_text().replace("#SBATCH --nodes=2", "# SBATCH --nodes=2"))
    job = Job(slurm, repository, script, *CPU)
    assert job.finish() == ("FAILED", "1:0")
    message = "error: this job is for 2 nodes (NODES) and got 1: ask for them with --nodes=2"
    assert message in job.output()


@pytest.mark.parametrize("script", [MULTI, SINGLE, MANUAL])
def test_wrong_settings_are_named(slurm, repository, script):
    wrong = {"VENV": "/nowhere", "SCRIPT": "nothing.py", "NPROC": "zero"}
    jobs = {
        name: Job(slurm, repository, script, *CPU, **{name: value}) for name, value in wrong.items()
    }
    for name, job in jobs.items():
        assert job.finish() == ("FAILED", "1:0")
        assert f"error: {name}={wrong[name]}: " in job.output()


def test_stage_04_on_two_nodes(slurm, repository, args, alone):
    job = Job(slurm, repository, MANUAL, *CPU, ARGS=args("-e", "run", "-b", 4))
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert worst_difference(metrics(alone), metrics(job.run_dir)) < 1e-4
    assert metrics(job.run_dir)[16]["world_size"] == 2
    assert "step    16" in (job.logs / "attempt0/node1.log").read_text()
    nothing_left(slurm, "end")


def test_stage_04_requeues_and_saves(slurm, repository, endless):
    job = Job(slurm, repository, MANUAL, *CPU, PREFLIGHT=0, ARGS=endless, WANDB_MODE=None)
    job.once_saved()
    slurm.command("scancel", "--batch", "--signal=USR1", job.number)  # as before the time limit
    job.wait_for("resuming after step")
    wait_for(lambda: (job.logs / "attempt1").exists(), what="the second attempt")
    stopped = saved_step(job.run_dir)
    wait_for(lambda: last_step(job.run_dir) > stopped, what="steps after the requeue")
    slurm.command("scancel", job.number)
    nothing_left(slurm, "scancel")
    assert saved_step(job.run_dir) == last_step(job.run_dir) > stopped


def over_ssh(slurm, repository, **env):
    """Start multinode_ssh.sh on node1, in a process group of its own as a terminal would."""
    (repository / "hosts.txt").write_text("# two hosts\nnode1\n\nnode2\n")
    env = {"HOSTS": "hosts.txt", "SSH": f"ssh -F {slurm.folder}/ssh_config", "VENV": VENV} | env
    script = repository / "job_scripts/multinode_ssh.sh"
    line = ["setsid", "--wait", "env", f"--chdir={repository}", script]
    run = slurm.start("node1", *line, **env)
    run.repository = repository
    return run


def launcher(slurm):
    return slurm.command("pgrep", "-of", "^bash .*multinode_ssh.sh").stdout.strip()


def test_ssh_trains_on_both_hosts(slurm, repository, args, alone):
    run = over_ssh(slurm, repository, ARGS=args("-e", "run", "-b", 4))
    (output,) = finish(run)
    assert run.returncode == 0, output
    assert "node1: [default0]:fit to train: 2 ranks on 2 hosts" in output
    assert worst_difference(metrics(alone), metrics(repository / "outputs/run")) < 1e-4
    assert metrics(repository / "outputs/run")[16]["world_size"] == 2
    for node in NODES:
        logs = repository / "outputs/jobs"
        assert list(logs.glob(f"*/{node}.training.log")), list(logs.glob("*/*"))
        assert list(logs.glob(f"*/{node}.training/*/attempt_0/0/stderr.log"))
    nothing_left(slurm, "end")


@pytest.mark.parametrize("end", ["Ctrl-C", "launcher killed", "rank killed"])
def test_ssh_ends_everything_everywhere(slurm, repository, corpus, endless, end):
    run = over_ssh(slurm, repository, PREFLIGHT=0, ARGS=endless)
    run_dir = repository / "outputs/run"
    wait_for((run_dir / "checkpoint.pt").exists, what=run.output)
    began = time.monotonic()
    if end == "Ctrl-C":
        slurm.command("kill", "-INT", "--", f"-{launcher(slurm)}")
    elif end == "launcher killed":
        slurm.command("kill", "-KILL", launcher(slurm))
    else:
        signal_rank(1, signal.SIGKILL, start=corpus)
    (output,) = finish(run)
    assert run.returncode != 0
    nothing_left(slurm, end)
    print(f"{end}: all over after {time.monotonic() - began:.0f} s")
    if end != "rank killed":
        assert saved_step(run_dir) == last_step(run_dir), output


def test_ssh_says_what_is_wrong(slurm, repository):
    wrong = {
        "HOSTS": ("nowhere.txt", "error: HOSTS=nowhere.txt: no such file"),
        "SCRIPT": ("nothing.py", "error: SCRIPT=nothing.py: not in "),
        "NPROC": ("zero", "error: NPROC=zero: must be a whole number above 0"),
        "VENV": ("/nowhere", "node2: error: VENV=/nowhere: no bin/torchrun in it"),
        "GLOO_SOCKET_IFNAME": ("eth7", "node2 has no interface eth7 (GLOO_SOCKET_IFNAME)"),
    }
    for name, (value, message) in wrong.items():
        run = over_ssh(slurm, repository, **{name: value})
        (output,) = finish(run)
        assert run.returncode == 1 and message in output, output
    assert not (repository / "outputs/ssh").exists()
