"""Two hosts on this machine, by 03-multi-node/two_hosts.sh, and torchrun over both of them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from stages import FOLDERS, ROOT, environment

TWO_HOSTS = ROOT / "03-multi-node" / "two_hosts.sh"


class Hosts:
    """node1 and node2; all that runs on them writes to files in folder, and ends with them."""

    def __init__(self, folder):
        self.folder = folder
        self.state = folder / "hosts"
        self.runs = []

    def __call__(self, *words, check=True, **env):
        """Run a command of two_hosts.sh: up, cut, heal, limit, off, down, run."""
        line = [TWO_HOSTS, *map(str, words)]
        env = environment(TWO_HOSTS=self.state, **env)
        # No pipe: what runs on in the background would hold it open.
        with open(self.folder / "two_hosts.log", "w+") as file:
            done = subprocess.run(line, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            file.seek(0)
            done.stdout = file.read()
        assert not check or done.returncode == 0, done.stdout
        return done

    def start(self, host, *words, **env):
        """Start a command on a host; return its process, which knows its output file."""
        path = self.folder / f"{host}-{len(self.runs)}.log"
        with open(path, "w") as file:
            run = subprocess.Popen(
                [TWO_HOSTS, "run", host, *map(str, words)],
                env=environment(**{"TWO_HOSTS": self.state, "WANDB_MODE": None} | env),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        run.output = path
        self.runs.append(run)
        return run

    def torchrun(self, host, *flags, script=None, processes=1, nnodes="2", options=(), **env):
        """Start stage 03 (or another script) on a host with the command line of the README."""
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes]
        line += ["--nproc-per-node", processes, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        line += [] if "--rdzv-endpoint" in options else ["--rdzv-endpoint", "node1:29500"]
        script = script or ROOT / FOLDERS["03"] / "train_llm.py"
        # Without the variable gloo cannot start again after a failure: see stage 03's README.
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1} | env
        return self.start(host, *line, *options, script, *flags, **env)

    def both(self, *flags, **options):
        return [self.torchrun(host, *flags, **options) for host in ("node1", "node2")]

    def down(self):
        self("down", check=False)
        for run in self.runs:
            run.wait(10)


def finish(*runs, timeout=240):
    """Wait for runs; return their outputs."""
    end = time.monotonic() + timeout
    for run in runs:
        try:
            run.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {run.output.read_text()}") from None
    return [run.output.read_text() for run in runs]


def wait_for(condition, timeout=180, what="condition"):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.02)


def pid_of_rank(rank, script="train_llm.py", start="/"):
    """Return the pid, seen from here, of a rank that trains with start in its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes()
        except OSError:
            continue
        ours = script.encode() in words and str(start).encode() in words
        if ours and re.search(rb"\0RANK=%d\0" % rank, b"\0" + variables):
            return int(folder.name)
    raise AssertionError(f"no process has rank {rank}")


def signal_rank(rank, number, start):
    os.kill(pid_of_rank(rank, start=start), number)


def why_not():
    """Return why this machine cannot have two hosts; None if it can."""
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    probe += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run([*probe, "ip", "link", "add", "test", "type", "bridge"])
    except OSError as error:
        return f"two hosts need Linux, util-linux and iproute2: {error}"
    return None if done.returncode == 0 else "two hosts: this kernel allows no network namespaces"
