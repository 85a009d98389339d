"""What job_scripts/*.pbs promise, on two hosts and a stand-in for OpenPBS (pbs.py)."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lab.hosts import Hosts, pid_of_rank, wait_for, why_not
from lab.pbs import NODES, PBS, Refused
from lab.stages import FOLDERS, ROOT, STEPS, metrics, smallest_script, worst_difference

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON)),
]

MULTI, SINGLE, MANUAL = "multinode_torchrun.pbs", "singlenode_torchrun.pbs", "manual_spawn.pbs"
FOREVER = ["--max-steps", 100_000, "--log-freq", 5, "--ckpt-freq", 100_000]


class Jobs(PBS):
    """PBS, a copy of the repository to submit from, and what a run of seconds needs."""

    def __init__(self, hosts, flags):
        super().__init__(hosts)
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

        def steps():
            return path.read_text().count("\n") if path.exists() else 0

        before = steps()
        over = lambda: all(job.state == "F" for job in self.jobs.values())  # noqa: E731
        wait_for(lambda: steps() > before + 1 or over(), 120, path)
        assert steps() > before, [self.end(job) for job in self.jobs]
        print(f"{run}: first steps {time.monotonic() - self.began:.1f} s after qsub")

    def end(self, job, within=120):
        """Wait for a job's end; return its exit status and output. It must leave no process."""
        began = time.monotonic()
        status, output = self.wait(job, within), self.jobs[job].output.read_text()
        print(f"{job}: exit status {status} after {time.monotonic() - began:.1f} s more\n{output}")
        return status, output

    def logs(self, job):
        """Return the folders of a job's attempts."""
        return sorted((self.outputs / "jobs" / job).iterdir())

    def left_behind(self):
        return [pid for host in NODES for pid in self.processes(host)]

    def words(self, *hosts):
        """Return {pid: command line} of the processes on hosts (default: all)."""
        found = {}
        for pid in [pid for host in hosts or NODES for pid in self.processes(host)]:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        return found

    def all_gone(self):
        wait_for(lambda: not self.left_behind(), timeout=5, what="all processes have gone")
        return True

    def saved_step(self, run):
        return torch.load(self.outputs / run / "checkpoint.pt", weights_only=True)["step"]

    def last_step(self, run):
        return list(metrics(self.outputs / run))[-1]


def run_of(array, index):
    """Return the id of a run of an array job: of `123[].server` the first is `123[0].server`."""
    return array.replace("[]", f"[{index}]")


def evaluate_slowly(script):
    """Let every evaluation of a script take longer than the time from TERM to KILL."""
    text = script.read_text()
    assert text.count("    model.eval()\n") == 1
    script.write_text(text.replace("    model.eval()\n", "    model.eval(), time.sleep(20)\n"))


@pytest.fixture
def pbs(tmp_path, model, corpus):
    hosts = Hosts(tmp_path)
    hosts("up")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 4, "--global-batch-size", 8]
    pbs = Jobs(hosts, [*flags, "-e", "run"])
    yield pbs
    pbs.close()
    hosts.down()


def test_the_stand_in_has_the_pitfalls_of_the_real_one(pbs):
    """A login shell on another host that runs `exit 0` in a home as Debian makes it; options of
    other pbsdshs; an array's id; a job's errors; qdel; what qsub refuses."""
    (pbs.repository / "task").write_text("set -e\nexit 0\n")
    script = 'pbsdsh -n 1 -- /bin/bash -l "$PBS_O_WORKDIR/task"\nexit 7\n'
    (pbs.repository / "job.pbs").write_text(f"#!/bin/bash\n{script}")
    job = pbs.qsub("-l", "select=2:ncpus=1,place=scatter", "job.pbs", cwd=pbs.repository)
    status, output = pbs.end(job)
    assert status == 7 and "pbsdsh: task 0x00000000 exit status 1\n" in output
    (pbs.repository / "job.pbs").write_text("#PBS -N torque\npbsdsh -h node2 -- hostname")
    jobs = pbs.qsub("-J", "0-1", "job.pbs", cwd=pbs.repository)
    assert re.fullmatch(r"\d+\[\]\.server", jobs)
    for job in run_of(jobs, 0), run_of(jobs, 1):
        status, output = pbs.end(job)
        assert (status, output) == (1, "") and "Usage: " in pbs.jobs[job].errors.read_text()
    assert re.fullmatch(r"torque\.e\d+\.1", pbs.jobs[job].errors.name)
    patient = "trap 'echo told' TERM\nsleep 4 & wait $! || wait $!\ntouch survived\nexit 3\n"
    (pbs.repository / "job.pbs").write_text(f"#!/bin/bash\ncd $PBS_O_WORKDIR\n{patient}")
    job = pbs.qsub("-N", "patient", "job.pbs", cwd=pbs.repository)
    wait_for(lambda: pbs.jobs[job].state == "R")
    time.sleep(1)
    pbs.qdel(job)
    began = time.monotonic()
    status, output = pbs.end(job)
    assert status == 271 and output == "told\n" and (pbs.repository / "survived").exists()
    assert 6 < time.monotonic() - began < 16, "the job stays until KILL"

    def refusal(*words):
        with pytest.raises(Refused) as refused:
            pbs.qsub(*words, cwd=pbs.repository)
        return refused.value.args

    multi = f"job_scripts/{MULTI}"
    assert refusal("-l", "nodes=2:ppn=2", multi)[0] == 6
    (pbs.repository / "broken").write_text((ROOT / multi).read_text().replace("#PBS -l s", "# PBS"))
    assert refusal("broken") == (7, 'qsub: Cannot have "place" without "select"')
    pbs.resources.remove("ngpus")
    assert refusal(multi) == (187, "qsub: Unknown resource: ngpus")


def test_preflight_then_the_same_loss_curve_from_the_root(pbs, alone):
    """With the default home of Debian, where a login shell on another host ends with 1."""
    two_lines = ["-l", "select=2:ncpus=1:mpiprocs=2"]  # for each host, in the node file
    job = pbs.submit(MULTI, *STEPS, options=two_lines, PREFLIGHT=1, NPROC="")
    pbs.has_started("run")
    status, output = pbs.end(job)
    assert status == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4
    assert "fit to train: 2 ranks on 2 hosts" in output
    assert output.count("node1: exit status 0\nnode2: exit status 0\n") == 2
    assert "[node1 rank 0] step 16  loss" in output and "frame #" not in output
    assert pbs.all_gone()
    (logs,) = pbs.logs(job)
    assert "[node1 rank 0] step 16  loss" in (logs / "node1.log").read_text()
    for host in NODES:  # and a file for each rank, of the preflight and of the training
        assert len(list(logs.glob(f"{host}/{job}*/attempt_0/0/stderr.log"))) == 2


def test_the_smallest_script_of_the_page_follows_the_curve(pbs, alone):
    script = smallest_script("#PBS", [*pbs.flags, *STEPS])
    (pbs.repository / "smallest.pbs").write_text(script)
    values = {"VENV": sys.prefix, "HF_HOME": os.environ["HF_HOME"], "OMP_NUM_THREADS": 1}
    given = ",".join(f"{name}={value}" for name, value in values.items())
    job = pbs.qsub("-v", f"{given},WANDB_MODE=disabled", "smallest.pbs", cwd=pbs.repository)
    assert pbs.end(job)[0] == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4


def test_stopped_before_the_walltime_and_continued_by_a_chained_job(pbs):
    """Time is up in the preflight: the ranks stop as soon as they listen. The chained job is of
    stage 04, so both ways to warn the ranks are tried."""
    options = {"folder": "job_scripts", "STOP_AFTER": 1, "PREFLIGHT": 1}
    first = pbs.submit(MULTI, *FOREVER, **options)
    second = pbs.submit(MANUAL, *FOREVER, options=["-W", f"depend=afterok:{first}"], **options)
    status, output = pbs.end(first)
    assert status == 0
    step = pbs.saved_step("run")
    assert f"stopped by SIGUSR1 after step {step}\n" in output
    status, output = pbs.end(second)
    assert status == 0
    assert pbs.saved_step("run") == pbs.last_step("run") > step
    assert f"stopped by SIGUSR1 after step {pbs.last_step('run')}\n" in output
    assert f"[node1 rank 0] step {step} of 100000, folder: " in output
    assert pbs.all_gone()


def test_an_array_on_the_same_hosts_one_job_loses_a_rank_the_other_is_deleted(pbs):
    """With two preflights at once, and with wandb, whose processes must go too."""
    array = ["-J", "1-2", "-N", "sweep"]
    variables = {"WANDB_MODE": "offline", "PREFLIGHT": 1}
    jobs = pbs.submit(MULTI, *FOREVER, options=array, **variables)
    lost, deleted = run_of(jobs, 1), run_of(jobs, 2)
    pbs.has_started("sweep-seed1")
    pbs.has_started("sweep-seed2")
    os.kill(pid_of_rank(1, start="sweep-seed1"), signal.SIGKILL)
    status, output = pbs.end(lost, within=30)
    assert status == 1 and "node2: exit status 1\n" in output
    assert re.search(r"exitcode  : -9 .*\n.*\n.*Signal 9 \(SIGKILL\) received", output)
    pbs.qdel(deleted)
    status, output = pbs.end(deleted, within=30)
    assert status == 271 and "stopped by SIGTERM after step" in output
    assert pbs.saved_step("sweep-seed2") == pbs.last_step("sweep-seed2") > 0
    assert pbs.all_gone()
    losses = [metrics(pbs.outputs / f"sweep-seed{seed}")[5]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("script", [MULTI, MANUAL])
def test_a_rerun_job_continues_with_logs_of_its_own_and_ends_at_the_walltime(pbs, script):
    """Saved in the 8 s between TERM and KILL, though an evaluation takes longer."""
    for folder in FOLDERS.values():
        evaluate_slowly(pbs.repository / folder / "train_llm.py")
    job = pbs.submit(script, *FOREVER, "--log-freq", 1)
    pbs.has_started("run")
    pbs.qrerun(job)
    wait_for((pbs.outputs / "run" / "checkpoint.pt").exists, 8, "saved on TERM")
    pbs.has_started("run")
    first, second = pbs.logs(job)
    step = pbs.saved_step("run")
    assert f"stopped by SIGTERM after step {step}\n" in (first / "node1.log").read_text()
    assert f"step {step} of 100000, folder: " in (second / "node1.log").read_text()
    pbs.end_of_walltime(job)
    status, output = pbs.end(job, within=30)
    assert status == -29 and output.count("stopped by SIGTERM after step") > 1
    assert "=>> PBS: job killed: walltime " in output
    assert pbs.saved_step("run") == pbs.last_step("run") > step
    assert pbs.all_gone()


@pytest.mark.parametrize("end, expected", [("qdel", 271), ("walltime", -29)])
def test_ranks_that_ignore_term_do_not_outlive_the_job(pbs, end, expected):
    deaf = pbs.repository / "deaf.py"
    deaf.write_text(
        "import signal, socket, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{socket.gethostname()}.started', 'w')\n"
        "time.sleep(600)\n"
    )
    limit = "00:00:05" if end == "walltime" else "01:00:00"  # noticed 8 s later
    job = pbs.submit(MULTI, SCRIPT="deaf.py", options=["-l", f"walltime={limit}"])
    wait_for(lambda: all((pbs.repository / f"{host}.started").exists() for host in NODES))
    assert len(pbs.left_behind()) >= 8
    if end == "qdel":
        pbs.qdel(job)
    assert pbs.end(job, within=40)[0] == expected
    assert pbs.all_gone()


def test_deleted_in_the_preflight(pbs):
    job = pbs.submit(MULTI, *FOREVER, PREFLIGHT=1)
    wait_for(lambda: any(b"check_cluster" in words for words in pbs.words().values()))
    pbs.qdel(job)
    status, output = pbs.end(job, within=30)
    assert status == 271 and not (pbs.outputs / "run").exists()
    assert pbs.all_gone()


def test_a_host_that_fails_alone_ends_the_job(pbs):
    """The other waits for it at the rendezvous, and would for ten minutes."""
    pbs.hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", f"{sys.prefix}/bin")
    status, output = pbs.end(pbs.submit(MULTI), within=50)
    assert status == 1 and "torchrun: command not found" in output
    assert "node1: exit status none: it still runs" in output
    assert "node2: exit status 127\n" in output
    assert pbs.all_gone()


def test_a_host_that_dies_ends_the_job(pbs):
    job = pbs.submit(MANUAL, *FOREVER, "--timeout", 20)
    pbs.has_started("run")
    for pid in pbs.processes("node2"):
        os.kill(pid, signal.SIGKILL)
    status, output = pbs.end(job, within=50)
    assert status == 1 and re.search("node2: exit status none: .* or has the host died?", output)
    assert pbs.all_gone()


def test_a_save_folder_that_the_hosts_do_not_share(pbs):
    pbs.outputs.mkdir()
    pbs.hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", pbs.outputs)
    status, output = pbs.end(pbs.submit(MULTI), within=50)
    assert status == 1 and re.search("node2: exit status none: .* sees no .*/outputs/", output)
    assert pbs.all_gone()


def test_a_failed_preflight_stops_the_job(pbs, tmp_path):
    """It looks where the training would save; and a variable of qsub -v is known on all hosts."""
    there = tmp_path / "there"
    variables = {"PREFLIGHT": 1, "GLOO_SOCKET_IFNAME": "eth7"}
    job = pbs.submit(MULTI, "--save-dir", there, **variables)
    status, output = pbs.end(job)
    assert status == 1 and output.count("node1: exit status 1\n") == 1
    assert "PROBLEM: node2 has no interface eth7 (GLOO_SOCKET_IFNAME)" in output
    assert f"--save-dir: {there}: " in output
    assert [path.name for path in there.iterdir()] == ["jobs", "check_cluster.json"]
    assert not pbs.outputs.exists() and pbs.all_gone()


def test_all_hosts_have_what_the_settings_export(pbs):
    """But the GPUs that a hook of PBS has chosen on each host, unless the settings choose."""
    script = pbs.repository / "job_scripts" / MANUAL
    export = "export ODD=$'two\\nlines, \"quoted\" $PATH' OF_BLOCK=1\n"
    script.write_text(script.read_text().replace("# module load", f"{export}# module load"))
    look = (
        "import json, os, socket\nprint('ENV', socket.gethostname(), json.dumps(dict(os.environ)))"
    )
    (pbs.repository / "look.py").write_text(look)
    pbs.of_host = {host: {"CUDA_VISIBLE_DEVICES": f"GPU-of-{host}"} for host in NODES}

    def environments():
        status, output = pbs.end(pbs.submit(MANUAL, SCRIPT="look.py"))
        assert status == 0
        return {h: json.loads(env) for h, env in re.findall(r"^ENV (\w+) (.*)$", output, re.M)}

    first, second = (environments()[host] for host in NODES)
    assert first["ODD"] == second["ODD"] == 'two\nlines, "quoted" $PATH'
    assert first["PATH"] == second["PATH"] and first["PATH"].startswith(f"{sys.prefix}/bin:")
    assert first["OMP_NUM_THREADS"] == second["OMP_NUM_THREADS"] == "1"
    assert [env["PBS_NODENUM"] for env in (first, second)] == ["0", "1"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in (first, second)] == [
        "GPU-of-node1",
        "GPU-of-node2",
    ]
    export = "export CUDA_VISIBLE_DEVICES=0,1\n"
    script.write_text(script.read_text().replace("# module load", f"{export}# module load"))
    envs = environments()
    assert [envs[host]["CUDA_VISIBLE_DEVICES"] for host in NODES] == ["0,1", "0,1"]
    assert pbs.all_gone()


@pytest.mark.parametrize(
    "script, options, variables, line",
    [
        (MULTI, ["-l", "place=free"], {}, "NODES is 2, and this job got 1: node1. Ask for them"),
        (SINGLE, ["-l", "select=2:ncpus=1", "-l", "place=scatter"], {}, "is 1, and this job got 2"),
        (MULTI, [], {"SCRIPT": "nope.py"}, "error: there is no nope.py in "),
        (SINGLE, [], {"VENV": "/nope"}, "error: there is no torchrun: VENV is '/nope'"),
        (MANUAL, [], {"SAVE_DIR": "/dev/null"}, "mkdir: cannot create directory"),
    ],
)
def test_one_clear_line(pbs, script, options, variables, line):
    status, output = pbs.end(pbs.submit(script, options=options, **variables))
    assert status == 1
    assert len(output.splitlines()) == 1 and line in output
    assert pbs.all_gone()


def test_a_start_file_that_does_not_know_pbs(pbs):
    (pbs.home / ".profile").write_text("PATH=/usr/bin:/bin\n")
    status, output = pbs.end(pbs.submit(MULTI))
    path = f"{sys.prefix}/bin:/usr/bin:/bin"
    assert (status, output) == (1, f"error: there is no pbsdsh in PATH: {path}\n")
    assert pbs.all_gone()


def test_submitted_from_elsewhere(pbs, tmp_path):
    folder = shutil.copytree(ROOT / "job_scripts", tmp_path / "my/jobs")
    for script in (SINGLE, MANUAL):
        status, output = pbs.end(pbs.qsub(script, cwd=folder))
        assert (status, output) == (1, f"error: {folder}: qsub this in the repository\n")


def test_a_flag_that_does_not_exist(pbs):
    status, output = pbs.end(pbs.submit(MULTI, "--max-stops", 3))
    assert status == 1
    assert "train_llm.py: error: unrecognized arguments: --max-stops 3" in output
    assert pbs.all_gone()


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
    status, output = pbs.end(job, within=30)
    assert status == 271 and "stopped by SIGTERM after step" in output
    assert pbs.saved_step("run") == pbs.last_step("run")
    assert pbs.all_gone()


def test_manual_spawn(pbs, alone):
    job = pbs.submit(MANUAL, *STEPS, PREFLIGHT=1)
    pbs.has_started("run")
    assert pbs.end(job)[0] == 0
    assert worst_difference(metrics(alone), metrics(pbs.outputs / "run")) < 1e-4
    failing = pbs.submit(MANUAL, *FOREVER, "-e", "failing")
    pbs.has_started("failing")
    words = pbs.words("node2")
    (rank,) = [pid for pid in words if b"spawn_main" in words[pid]]
    os.kill(rank, signal.SIGKILL)
    status, output = pbs.end(failing, within=60)
    assert status == 1 and "process 0 terminated with signal SIGKILL" in output
    assert pbs.all_gone()
