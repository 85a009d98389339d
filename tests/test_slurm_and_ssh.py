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
from lab.hosts import finish, pid_of_rank, wait_for, why_not
from lab.slurm import NODES, Slurm, why_not_slurm
from lab.stages import ROOT, STEPS, metrics, smallest_script, worst_difference

BIN = Path(sys.executable).parent
VENV = BIN.parent if (BIN / "activate").exists() else ""  # where these tests run
REASON = why_not() or why_not_slurm()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON)),
]

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


@pytest.fixture(autouse=True)
def no_job_of_another_test(slurm):
    yield
    slurm.command("scancel", "--user=root")


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

    def wait_for(self, pattern):
        """Wait until the output, which comes later than metrics.jsonl, matches a pattern."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
        wait_for(
            lambda: (
                re.search(pattern, self.output()) or self.slurm.state_of(self.number)[0] in ends
            ),
            what=lambda: f"{pattern} in {self.output()}",
        )
        assert re.search(pattern, self.output()), self.output()

    def wait_for_attempt(self, number):
        """Wait until the job has been requeued and has begun again."""
        self.wait_for(f"logs: outputs/jobs/{self.number}/attempt{number}")

    def once_saved(self):
        """Wait until a checkpoint is there; return the step at which it was made."""
        self.wait_for("step 5  loss")
        print(f"{self.name}: first step logged {time.time() - self.began:.0f} s after sbatch")
        wait_for((self.run_dir / "checkpoint.pt").exists, what="a checkpoint")
        return saved_step(self.run_dir)


def saved_step(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]


def last_step(run_dir):
    return list(metrics(run_dir))[-1]


def nothing_left(slurm, what):
    began = time.monotonic()
    wait_for(lambda: slurm.left_behind() == [], timeout=40, what=slurm.left_behind)
    print(f"{what}: nothing left on the nodes after {time.monotonic() - began:.0f} s")


def test_two_nodes_from_the_root(slurm, repository, args, alone):
    job = Job(slurm, repository, MULTI, *CPU, ARGS=args("-e", "run", "-b", 4))
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert worst_difference(metrics(alone), metrics(job.run_dir)) < 1e-4
    assert metrics(job.run_dir)[16]["world_size"] == 2
    assert "fit to train: 2 ranks on 2 hosts" in job.output() and "frame #" not in job.output()
    assert "0: [default0]:" in job.output() and "[node1 rank 0] step 16  loss" in job.output()
    for node in NODES:  # of the preflight and of the training
        files = list((job.logs / "attempt0" / node).glob("*/attempt_0/0/stderr.log"))
        assert len(files) == 2
    nothing_left(slurm, "end")


def test_the_smallest_script_of_the_page_follows_the_curve(slurm, repository, args, alone):
    """Submitted, and typed into a shell that salloc gives."""
    flags = [args("-b", 4), "--save-dir", repository / "outputs", "-e"]
    sent, typed = (smallest_script("#SBATCH", [*flags, name]) for name in ("sent", "typed"))
    (repository / "smallest.sbatch").write_text(sent)
    number = slurm.submit("smallest.sbatch", cwd=repository)
    assert slurm.finish(number) == [("COMPLETED", "0:0")]
    (repository / "typed").write_text(typed)
    line = ["salloc", "--nodes=2", "--ntasks-per-node=1", "bash", "typed"]
    done = slurm.command(*line, cwd=repository)
    assert done.returncode == 0, done.stderr
    for name in ("sent", "typed"):
        assert worst_difference(metrics(alone), metrics(repository / "outputs" / name)) < 1e-4
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
    assert "fit to train: 2 ranks on 1 host\n" in job.output()
    nothing_left(slurm, "end")


def test_one_node_goes_on_after_the_warning(slurm, repository, endless):
    args = endless.replace("--timeout 20", "")  # which stage 02 does not have
    job = Job(slurm, repository, SINGLE, *CPU, PREFLIGHT=0, ARGS=args)
    job.once_saved()
    slurm.command("scancel", "--batch", "--signal=USR1", job.number)  # as before the time limit
    job.wait_for_attempt(1)
    step = saved_step(job.run_dir)
    wait_for(lambda: last_step(job.run_dir) > step, what="steps after the requeue")
    job.wait_for(r"step [1-9]\d*0 of 1000000, folder: ")
    slurm.command("scancel", job.number)
    nothing_left(slurm, "scancel")


def test_an_array_of_seeds_on_shared_nodes(slurm, repository, args, alone):
    """Both tasks run at once on the same two nodes: each has its own port, and the preflight of
    one does not see that of the other."""
    env = {"VENV": VENV, "PREFLIGHT": 1, "ARGS": args("-b", 4)}
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
    job.wait_for(f"step {stopped} of 1000000, folder: ")
    wait_for(lambda: last_step(job.run_dir) > stopped, what="steps after the requeue")
    assert sorted(path.name for path in job.logs.iterdir()) == ["attempt0", "attempt1"]

    slurm.command("scancel", job.number)
    assert job.finish()[0] == "CANCELLED"
    nothing_left(slurm, "scancel")
    assert saved_step(job.run_dir) == last_step(job.run_dir) > stopped
    # To the file only: torchrun, which passes the output on, hears the signal first.
    assert "stopped by SIGTERM after step" in (job.run_dir / "rank0.log").read_text()


@pytest.mark.parametrize("script", [MULTI, MANUAL, SINGLE])
def test_a_warning_during_the_preflight_does_not_lose_the_job(slurm, repository, args, script):
    job = Job(slurm, repository, script, *CPU, ARGS=args("-e", "run", "-b", 4))
    wait_for(
        lambda: any("check_cluster" in line for line in slurm.left_behind()),
        what=lambda: f"{slurm.job(job.number)} {slurm.left_behind()} {job.output()}: preflight",
    )
    slurm.command("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_attempt(1)
    assert not job.run_dir.exists()
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert last_step(job.run_dir) == 16
    assert job.output().count("fit to train: ") == 2
    nothing_left(slurm, "end")


@pytest.mark.parametrize("script", [MULTI, MANUAL])
def test_a_dead_rank_fails_the_job_and_the_next_in_the_chain_goes_on(
    slurm, repository, corpus, endless, script
):
    job = Job(slurm, repository, script, *CPU, PREFLIGHT=0, ARGS=endless)
    after = f"--dependency=afterany:{job.number}"
    chained = Job(slurm, repository, MULTI, *CPU, after, PREFLIGHT=0, ARGS=endless)
    job.once_saved()
    began = time.monotonic()
    if script == MULTI:
        os.kill(pid_of_rank(1, start=corpus), signal.SIGKILL)
    else:  # mp.spawn tells its processes their rank in another way
        slurm("run", "node2", "pkill", "-KILL", "-f", "spawn_main")
    state, status = job.finish()
    assert state == "FAILED" and status != "0:0", job.output()
    print(f"failed {time.monotonic() - began:.0f} s after the death of the rank: {status}")
    assert time.monotonic() - began < 20
    assert re.search(r"Signal 9 \(SIGKILL\) received|terminated with signal SIGKILL", job.output())
    chained.wait_for(f"step {saved_step(job.run_dir)} of 1000000, folder: ")
    slurm.command("scancel", chained.number)
    assert chained.finish()[0] == "CANCELLED"
    nothing_left(slurm, "scancel while loading")


def test_a_failed_preflight_ends_the_job_before_training(slurm, repository, args, tmp_path):
    """It looks where the training would save, also if that is said in ARGS."""
    flags = args("-e", "run", "--save-dir", tmp_path / "there")
    job = Job(slurm, repository, MULTI, *CPU, ARGS=flags, GLOO_SOCKET_IFNAME="eth7")
    state, status = job.finish()
    assert state == "FAILED" and status != "0:0", job.output()
    assert "node2 has no interface eth7 (GLOO_SOCKET_IFNAME)" in job.output()
    assert f"--save-dir: {tmp_path}/there: " in job.output()
    assert not (repository / "outputs").exists() and not (tmp_path / "there/run").exists()
    nothing_left(slurm, "failed preflight")


@pytest.mark.parametrize("script", [MULTI, MANUAL])
def test_a_job_with_fewer_nodes_than_it_is_for(slurm, repository, script):
    """As when the line that asks for them has become a comment."""
    path = repository / "job_scripts" / script
    path.write_text(path.read_text().replace("#SBATCH --nodes=2", "# SBATCH --nodes=2"))
    job = Job(slurm, repository, script, *CPU)
    assert job.finish() == ("FAILED", "1:0")
    assert job.output() == "error: NODES is 2, and this job got 1 (--nodes)\n"


@pytest.mark.parametrize("script", [MULTI, SINGLE, MANUAL])
def test_one_clear_line(slurm, repository, tmp_path, script):
    elsewhere = shutil.copytree(repository / "job_scripts", tmp_path / "my/jobs")
    jobs = {
        "error: there is no torchrun: VENV is '/nowhere'": {"VENV": "/nowhere"},
        "error: there is no nothing.py in ": {"SCRIPT": "nothing.py"},
        "mkdir: cannot create directory": {"SAVE_DIR": "/dev/null"},
        f"train_llm.py in {tmp_path}/my: sbatch this in the repository": {"cwd": elsewhere},
    }
    jobs = {line: Job(slurm, repository, script, *CPU, **how) for line, how in jobs.items()}
    for line, job in jobs.items():
        assert job.finish() == ("FAILED", "1:0"), job.output()
        assert line in job.output() and len(job.output().splitlines()) == 1, job.output()


def test_a_flag_that_does_not_exist(slurm, repository):
    jobs = [
        Job(slurm, repository, script, *CPU, PREFLIGHT=0, ARGS="--max-stops 3")
        for script in (MULTI, MANUAL)
    ]
    for job in jobs:
        state, status = job.finish()
        assert state == "FAILED" and status != "0:0"
        assert "train_llm.py: error: unrecognized arguments: --max-stops 3" in job.output()


def test_stage_04_on_two_nodes(slurm, repository, args, alone):
    job = Job(slurm, repository, MANUAL, *CPU, ARGS=args("-e", "run", "-b", 4))
    assert job.finish() == ("COMPLETED", "0:0"), job.output()
    assert worst_difference(metrics(alone), metrics(job.run_dir)) < 1e-4
    assert metrics(job.run_dir)[16]["world_size"] == 2
    assert "step 16  loss" in (job.logs / "attempt0/node1.log").read_text()
    assert "0: " in job.output() and "step 16  loss" in job.output()
    nothing_left(slurm, "end")


def test_stage_04_requeues_and_saves(slurm, repository, endless):
    job = Job(slurm, repository, MANUAL, *CPU, PREFLIGHT=0, ARGS=endless, WANDB_MODE=None)
    job.once_saved()
    slurm.command("scancel", "--batch", "--signal=USR1", job.number)  # as before the time limit
    job.wait_for_attempt(1)
    stopped = saved_step(job.run_dir)
    wait_for(lambda: last_step(job.run_dir) > stopped, what="steps after the requeue")
    job.wait_for(f"step {stopped} of 1000000, folder: ")
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
    assert re.search(r"node1: \[default0\]:.* \[node1 rank 0\] step 16  loss", output)
    assert worst_difference(metrics(alone), metrics(repository / "outputs/run")) < 1e-4
    assert metrics(repository / "outputs/run")[16]["world_size"] == 2
    for node in NODES:
        logs = repository / "outputs/jobs"
        assert list(logs.glob(f"*/{node}.log")), list(logs.glob("*/*"))
        assert len(list(logs.glob(f"*/{node}/*/attempt_0/0/stderr.log"))) == 2
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
        os.kill(pid_of_rank(1, start=corpus), signal.SIGKILL)
    (output,) = finish(run)
    assert run.returncode != 0
    nothing_left(slurm, end)
    print(f"{end}: all over after {time.monotonic() - began:.0f} s")
    if end != "rank killed":
        assert saved_step(run_dir) == last_step(run_dir), output


def test_ssh_says_what_is_wrong(slurm, repository):
    wrong = {
        "HOSTS": ("nowhere.txt", "error: there is no file nowhere.txt (HOSTS)"),
        "SCRIPT": ("nothing.py", "error: there is no nothing.py in "),
        "SAVE_DIR": ("/dev/null", "mkdir: cannot create directory"),
        "VENV": ("/nowhere", "error: there is no torchrun: VENV is '/nowhere'"),
        "ARGS": ("--max-stops 3", "train_llm.py: error: unrecognized arguments: --max-stops 3"),
        "GLOO_SOCKET_IFNAME": ("eth7", "node2 has no interface eth7 (GLOO_SOCKET_IFNAME)"),
    }
    for name, (value, message) in wrong.items():
        run = over_ssh(slurm, repository, **{name: value})
        (output,) = finish(run)
        assert run.returncode == 1 and message in output, output
    assert not (repository / "outputs/ssh").exists()
