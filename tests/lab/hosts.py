"""Two hosts on this machine, by 03-multi-node/two_hosts.sh, and torchrun over both of them."""

import ctypes
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lab.stages import FOLDERS, ROOT, be_python, environment, forkserver

TWO_HOSTS = ROOT / "03-multi-node" / "two_hosts.sh"
REFERENCE = ROOT / "03-multi-node" / "reference.md"


class Hosts:
    """node1 and node2; all that runs on them writes to files in folder, and ends with them.

    forked: torchrun and its ranks start without the time that importing the libraries takes, and
    then not with variables that the libraries read while they are imported.
    """

    def __init__(self, folder, forked=False):
        self.folder, self.forked = folder, forked
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
                env=environment(TWO_HOSTS=self.state, **env),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        run.output = path
        self.runs.append(run)
        return run

    def fork(self, host, *words, **env):
        """Do `start(host, "python", *words)`, forked from a process that has the libraries."""
        path = self.folder / f"{host}-{len(self.runs)}.log"
        first = int((self.state / host).read_text())  # the process that holds the host
        run = Forked(first, list(map(str, words)), environment(**env), path)
        self.runs.append(run)
        return run

    def python(self, host, *words, **env):
        """Start a script with its flags."""
        if self.forked:
            return self.fork(host, *words, **env)
        return self.start(host, sys.executable, *words, **env)

    def torchrun(
        self, host, *flags, script="03", processes=1, nnodes="2", options=(), before=None, **env
    ):
        """Start a stage (or another script) on a host with the command line of stage 03's README.

        before: words in front of the command line, maybe none; then it is not forked.
        """
        line = ["-m", "torch.distributed.run", "--nnodes", nnodes, "--nproc-per-node", processes]
        line += ["--rdzv-backend", "c10d", "--rdzv-id", "test"]
        line += [] if "--rdzv-endpoint" in options else ["--rdzv-endpoint", "node1:29500"]
        line += [*options, ROOT / FOLDERS[script] / "train_llm.py" if script in FOLDERS else script]
        # Without the variable gloo cannot start again after a failure: see stage 03's README.
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1} | env
        if not self.forked:
            env = {"WANDB_MODE": None} | env  # as a reader's
        if before is None:
            return self.python(host, *line, *flags, **env)
        return self.start(host, *before, sys.executable, *line, *flags, **env)

    def spawn(self, host, node_rank, *flags, script="04", processes=1, **env):
        """Start stage 04 (or another script) on a host, with the command line of its README."""
        script = ROOT / FOLDERS[script] / "train_llm.py" if script in FOLDERS else script
        more = ["--nnodes", 2, "--node-rank", node_rank, "--nproc-per-node", processes]
        return self.python(host, script, "--master-addr", "node1", *flags, *more, **env)

    def both(self, *flags, **options):
        return [self.torchrun(host, *flags, **options) for host in ("node1", "node2")]

    def down(self):
        self("down", check=False)
        for run in self.runs:
            run.wait(10)


class Forked:
    """What Hosts.fork starts: as much of a subprocess.Popen as the tests need."""

    def __init__(self, host, words, env, output):
        self.words, self.output = words, output
        self.process = forkserver.Process(target=be_python_on, args=(host, words, env, output))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.poll()

    def pid(self, rank=None):
        """Return the pid, seen from here, of the script, or of one of the ranks that it started."""
        (script,) = children(self.process.pid)
        return script if rank is None else children(script)[rank]


def be_python_on(host, words, env, output):
    """Go to a host, as nsenter does, and be `python WORDS` there. host: pid of its first process"""
    folder, libc = os.getcwd(), ctypes.CDLL(None, use_errno=True)
    names = ["user"] * (os.geteuid() != 0) + ["net", "uts", "pid", "mnt"]
    for file in [os.open(f"/proc/{host}/ns/{name}", os.O_RDONLY) for name in names]:
        if libc.setns(file, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    if child := os.fork():  # in the host's process table are only the children of who enters it
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    os.chdir(folder)
    be_python(words, env, (output, output))


def children(pid):
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def descendants(pid):
    """Return the ids of a process and of all that it and its children have started, as of now."""
    try:
        return [pid, *(one for child in children(pid) for one in descendants(child))]
    except FileNotFoundError:
        return []


def finish(*runs, timeout=240):
    """Wait for runs; return their outputs."""
    end = time.monotonic() + timeout
    for run in runs:
        try:
            run.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {run.output.read_text()}") from None
    return [run.output.read_text() for run in runs]


def succeed(*runs, **options):
    """Wait as finish does; assert that all runs have ended well."""
    outputs = finish(*runs, **options)
    assert all(run.returncode == 0 for run in runs), outputs
    return outputs


def wait_for(condition, timeout=180, what="condition"):
    """Wait until condition() holds. what: a text for the failure, or a function that returns it."""
    end = time.monotonic() + timeout
    while not condition():
        late = time.monotonic() > end
        assert not late, f"{what() if callable(what) else what}: not within {timeout} s"
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


def root_cause(output):
    """Return the last block that torchrun prints: what failed first on its node."""
    return output.rpartition("Root Cause (first observed failure):")[2]


def assert_seen(text, output):
    """text is in the output, and a reader who searches for it finds it in the reference."""
    assert text in output, output
    assert text in REFERENCE.read_text(), f"{REFERENCE.name} lacks: {text}"


def why_not():
    """Return why this machine cannot have two hosts; None if it can."""
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    probe += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run([*probe, "ip", "link", "add", "test", "type", "bridge"])
    except OSError as error:
        return f"two hosts need Linux, util-linux and iproute2: {error}"
    return None if done.returncode == 0 else "two hosts: this kernel allows no network namespaces"
