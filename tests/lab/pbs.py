"""A stand-in for OpenPBS on the two hosts of hosts.py: no package of PBS can be installed here.

Jobs are real processes on both hosts, and get real signals. It does what OpenPBS v23.06.06 did on
two hosts in more than a hundred jobs: how directives, `select` and `place` make the node file; what
a job and a task of pbsdsh find in their environment, and in a home of Debian's; who hears TERM and
KILL after qdel, qrerun, at the walltime and at a job's end (the processes of the job's sessions,
and not those that have left them), and when; exit statuses. The node file and the copy of the
script are on the first host only. pbs_tools.py holds pbsdsh and pbs_tmrsh.

Not imitated: queues, limits, users, accounting, hooks. There is no waiting for free hosts: a job
starts when its dependencies allow it, beside any others. What a task of pbsdsh prints as an error
always joins its output. KILL came 8 to 29 s after TERM: here always after kill_delay. The first
process of a session is outside the hosts, so that its number can be seen from here.
"""

import argparse
import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from lab.hosts import wait_for

NODES = {"node1": {"ncpus": 8, "ngpus": 2}, "node2": {"ncpus": 8, "ngpus": 2}}
TOOLS = Path(__file__).with_name("pbs_tools.py")
RESOURCES = {"select", "place", "walltime", "ncpus", "ngpus", "mpiprocs", "ompthreads", "mem"}
RESOURCES |= {"nodes"}
LATE = 8  # seconds that the end of the walltime is noticed after it
AS_USER = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]

# What Debian and Ubuntu put into a new home. A login shell that runs `exit` reads it, and its
# last command fails where there is no console.
BASH_LOGOUT = """
if [ "$SHLVL" = 1 ]; then
    [ -x /usr/bin/clear_console ] && /usr/bin/clear_console -q
fi
"""


class Refused(Exception):
    """What qsub says of a job that it does not take: its exit status and a line."""


class PBS:
    def __init__(self, hosts, kill_delay=8):
        self.hosts, self.kill_delay, self.closed = hosts, kill_delay, False
        self.resources = set(RESOURCES)  # that this site knows
        self.of_host = {}  # {host: variables that a hook of the site sets there}
        self.jobs, self.numbers, self.first = {}, count(123), []
        self.first = [pid for host in NODES for pid in self.processes(host)]  # the hosts' own
        self.home, self.bin = hosts.folder / "pbs" / "home", hosts.folder / "pbs" / "bin"
        self.mom = hosts.folder / "pbs" / "mom"  # node1's own folder
        for folder in (self.home, self.bin, self.mom):
            folder.mkdir(parents=True)
        hosts("run", "node2", "mount", "-t", "tmpfs", "tmpfs", self.mom)
        # On a real host /etc/profile.d does this; pbsdsh's tasks, without a login, do not see it.
        (self.home / ".profile").write_text(f"PATH={self.bin}:$PATH\n")
        (self.home / ".bash_logout").write_text(BASH_LOGOUT)
        self.socket = tempfile.mkdtemp() + "/socket"  # its path may have 107 characters, no more
        for tool in ("pbsdsh", "pbs_tmrsh"):
            line = shlex.join([sys.executable, "-IS", str(TOOLS), self.socket, tool])
            (self.bin / tool).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
            (self.bin / tool).chmod(0o755)
        pbs = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):  # the tool has left
                    pbs.run_tasks(self.rfile, self.wfile)
                    self.connection.shutdown(socket.SHUT_RDWR)  # nobody waits for TERM any more

        self.server = socketserver.ThreadingUnixStreamServer(self.socket, Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        """Forget all jobs; the hosts end their processes."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()
        shutil.rmtree(Path(self.socket).parent)

    # What a user does.

    def qsub(self, *words, cwd):
        """Submit a job; return its id. That of an array is `123[].server`; it runs as
        `123[0].server` and so on."""
        words = [str(word) for word in words]
        script = parse(words).script
        if len(script) != 1:
            raise ValueError(f"qsub: one script and no arguments for it: {script}")
        text, directives = (cwd / script[0]).read_text(), []
        for line in text.splitlines():
            if line.startswith("#PBS "):
                directives += shlex.split(line[5:])
            elif line.strip() and not line.startswith("#"):
                break  # a command: directives after it are comments
        options = parse([*directives, *words])  # of two the last one wins: the command line
        resources = dict(item.partition("=")[::2] for item in ",".join(options.l).split(","))
        asked = [*resources, *re.findall(r":(\w+)=", resources.get("select", ""))]
        for name in filter(None, asked):
            if name not in self.resources:
                raise Refused(187, f"qsub: Unknown resource: {name}")
        if "nodes" in resources and {"select", "place"} & resources.keys():
            raise Refused(6, "qsub: Cannot be used with select or place: nodes")
        if "place" in resources and "select" not in resources:
            raise Refused(7, 'qsub: Cannot have "place" without "select"')
        variables = dict(os.environ) if options.V else {}
        for item in re.findall(r"""(?:[^,"']|"[^"]*"|'[^']*')+""", ",".join(options.v)):
            name, _, value = item.partition("=")
            variables[name] = re.sub(r"""(["'])(.*?)\1""", r"\2", value)
        number, name = next(self.numbers), options.N or Path(script[0]).name
        first, last = map(int, options.J.split("-")) if options.J else (0, 0)
        for index in range(first, last + 1):
            brackets, suffix = (f"[{index}]", f".{index}") if options.J else ("", "")
            job = SimpleNamespace(id=f"{number}{brackets}.server", name=name, script=text)
            job.lines, job.ncpus = place(resources)
            job.variables = variables | ({"PBS_ARRAY_INDEX": index} if options.J else {})
            job.submitted_from, job.depend = cwd, [w for w in options.W if w.startswith("depend=")]
            job.output = cwd / (options.o or f"{name}.o{number}{suffix}")
            joined = options.j == "oe"
            job.errors = job.output if joined else cwd / f"{name}.e{number}{suffix}"
            hours, minutes, seconds = map(int, resources.get("walltime", "9:00:00").split(":"))
            job.walltime = 3600 * hours + 60 * minutes + seconds
            job.state, job.exit_status, job.over = "Q", None, False
            self.jobs[job.id] = job
            threading.Thread(target=self.run, args=[job], daemon=True).start()
        return f"{number}[].server" if options.J else job.id

    def wait(self, job_id, timeout=60):
        """Return the exit status of a job that has ended; None if it never started."""
        job = self.jobs[job_id]
        wait_for(lambda: job.state == "F", timeout, f"the end of {job_id}")
        return job.exit_status

    def qdel(self, job_id):
        """TERM to the sessions on the first host; kill_delay later KILL to all, in any case."""
        job = self.jobs[job_id]
        job.kill = threading.Timer(self.kill_delay, self.signal, [job, signal.SIGKILL])
        job.kill.daemon = True
        job.kill.start()
        self.signal(job, signal.SIGTERM, only="node1")

    def end_of_walltime(self, job_id):
        job = self.jobs[job_id]
        with open(self.mom / f"{job_id}.{'OU' if job.errors == job.output else 'ER'}", "a") as file:
            late = job.walltime + LATE
            print(f"=>> PBS: job killed: walltime {late} exceeded limit {job.walltime}", file=file)
        job.over = True
        self.qdel(job_id)

    def qrerun(self, job_id):
        """What an operator may do; users are told `Unauthorized Request`."""
        self.jobs[job_id].requeued = True
        self.qdel(job_id)

    # What the daemons do.

    def run(self, job):
        """Run a job's script on the first host, once its dependencies allow it."""
        for depend in job.depend:
            kind, *others = depend.removeprefix("depend=").split(":")
            for other in (self.jobs[name] for name in others):
                while other.state != "F":
                    time.sleep(0.1)
                if kind != "afterany" and (kind == "afterok") != (other.exit_status == 0):
                    job.state = "F"
                    return
        files = {end: self.mom / f"{job.id}.{end}" for end in ("SC", "OU", "ER", "nodes")}
        if job.errors == job.output:
            files["ER"] = files["OU"]
        files["SC"].write_text(job.script)
        files["SC"].chmod(0o700)
        (self.mom / f"{job.id}.in").write_text(f"{files['SC']}\n")
        files["nodes"].write_text("".join(f"{line}\n" for line in job.lines))
        scratch = Path(self.socket).parent / job.id  # short: sockets are made in it
        scratch.mkdir()
        variables = {
            "PBS_JOBID": job.id,
            "PBS_JOBNAME": job.name,
            "PBS_NODEFILE": files["nodes"],
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBDIR": self.home,
            "PBS_O_WORKDIR": job.submitted_from,
            "PBS_O_HOME": self.home,
            "PBS_O_HOST": "login",
            "PBS_O_PATH": os.environ["PATH"],
            "PBS_O_SHELL": "/bin/bash",
            "TMPDIR": scratch,
        }
        job.variables |= variables
        of_script = {"NCPUS": job.ncpus, "OMP_NUM_THREADS": job.ncpus}
        job.state = "R"
        while True:
            job.sessions, job.deaf, job.requeued, job.kill = [], False, False, None
            # The session's leader is a login shell that reads the script's name as a command. The
            # script is its child, and outlives it: the leader dies of TERM at once.
            line = ["/bin/bash", "-c", "exec -a -bash /bin/bash"]
            with (
                open(self.mom / f"{job.id}.in") as name,
                open(files["OU"], "ab") as output,
                open(files["ER"], "ab") as errors,
            ):
                leader = self.spawn(job, job.lines[0], line, name, output, errors, **of_script)
            try:
                status = leader.wait(job.walltime + LATE)
            except subprocess.TimeoutExpired:
                self.end_of_walltime(job.id)
                status = leader.wait()
            if job.kill:  # the job stays until then, even if all its processes have ended
                job.kill.join()
            if self.closed:
                return
            self.signal(job, signal.SIGKILL)
            if not job.requeued:
                break
        with contextlib.suppress(OSError):
            for name, path in {files["OU"]: job.output, files["ER"]: job.errors}.items():
                with open(path, "ab") as output:
                    output.write(name.read_bytes())
        job.exit_status = -29 if job.over else 256 - status if status < 0 else status
        job.state = "F"

    def spawn(self, job, host, line, stdin, stdout, stderr, **variables):
        """Start a process in a session of its own on a host, in $HOME, as a job's or a task's."""
        user = {"HOME": self.home, "USER": "user", "LOGNAME": "user", "SHELL": "/bin/bash"}
        user |= {"PATH": "/bin:/usr/bin", "PBS_NODENUM": list(NODES).index(host)}
        user |= self.of_host.get(host, {})
        words = [f"{k}={v}" for k, v in (job.variables | user | variables).items()]
        enter = ["nsenter", "--target", self.first_process(host), *AS_USER]
        enter += ["--net", "--uts", "--mount", "--pid"]
        process = subprocess.Popen(
            [*enter, "env", "-i", f"--chdir={self.home}", *words, *map(str, line)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            umask=0o077,
            start_new_session=True,
        )
        job.sessions.append((host, process))
        return process

    def run_tasks(self, questions, answers):
        """Start what pbsdsh or pbs_tmrsh asks for, answer with exit statuses, pass TERM on."""
        question = json.loads(questions.readline())
        job, host, line = (self.jobs[question["job"]], question["host"], question["line"])

        def answer(**values):
            answers.write(json.dumps(values).encode() + b"\n")

        if host and host not in job.lines:
            return answer(error=f"{host}: not a host of this job")
        tasks = []
        for node in [host] if host else job.lines if line is None else [job.lines[int(line)]]:
            read, write = os.pipe()
            task = self.spawn(job, node, question["words"], subprocess.DEVNULL, write, write)
            tasks.append((node, task))
            os.close(write)
            threading.Thread(target=self.deliver, args=[job, read], daemon=True).start()

        def pass_term_on():
            if questions.readline() == b"TERM\n":
                job.deaf = True
                self.signal(job, signal.SIGTERM, tasks)

        threading.Thread(target=pass_term_on, daemon=True).start()
        for number, (_, task) in enumerate(tasks):
            status = task.wait()
            answer(task=number, status=256 - status if status < 0 else status)

    def deliver(self, job, pipe):
        """Add a task's output to the job's, until the job has been told to stop."""
        with open(self.mom / f"{job.id}.OU", "ab", buffering=0) as output:
            while not job.deaf:
                if select.select([pipe], [], [], 0.1)[0]:
                    text = os.read(pipe, 65536)
                    if not text:
                        break
                    output.write(text)
        os.close(pipe)

    def signal(self, job, number, sessions=None, only=None):
        """Send a signal to the processes of sessions (default: the job's), as a MoM does."""
        for host, process in [] if self.closed else sessions or list(job.sessions):
            for pid in self.processes(host) if only in (None, host) else []:
                with contextlib.suppress(ProcessLookupError):
                    if os.getsid(pid) == process.pid:
                        os.kill(pid, number)

    def first_process(self, host):
        return (self.hosts.state / host).read_text().strip()

    def processes(self, host):
        """Return the pids, seen from here, of the processes that have come to a host since."""
        pids, home = [], os.readlink(f"/proc/{self.first_process(host)}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                zombie = ") Z " in (folder / "stat").read_text()
                if os.readlink(folder / "ns/pid") == home and not zombie:
                    pids.append(int(folder.name))
        return [pid for pid in pids if pid not in self.first]


def parse(words):
    parser = argparse.ArgumentParser(prog="qsub", allow_abbrev=False, exit_on_error=False)
    for name in "lvW":
        parser.add_argument(f"-{name}", action="append", default=[])
    for name in "NojkJqPrm":
        parser.add_argument(f"-{name}")
    parser.add_argument("-V", action="store_true")
    parser.add_argument("script", nargs="*")
    return parser.parse_args(words)


def place(resources):
    """Return the lines of the node file and the ncpus of the first chunk."""
    if "select" in resources and {"ncpus", "ngpus"} & resources.keys():
        raise ValueError("qsub: -l ncpus and -l ngpus cannot stand beside -l select")
    chunks = []
    plain = ":".join(f"{k}={resources[k]}" for k in ("ncpus", "ngpus") if k in resources)
    for part in resources.get("select", f"1:{plain}").split("+"):
        number, _, rest = part.partition(":")
        chunks += [dict(item.split("=") for item in rest.split(":") if item)] * int(number)
    free, used, lines = {host: dict(has) for host, has in NODES.items()}, set(), []
    for chunk in chunks:
        need = {"ncpus": int(chunk.get("ncpus", 1)), "ngpus": int(chunk.get("ngpus", 0))}
        fits = [host for host in NODES if all(free[host][k] >= need[k] for k in need)]
        if resources.get("place") == "scatter":
            fits = [host for host in fits if host not in used]
        if not fits:
            raise ValueError("this can never run: it would stay in the queue")
        used.add(fits[0])
        for name in need:
            free[fits[0]][name] -= need[name]
        lines += fits[:1] * int(chunk.get("mpiprocs", 1))
    return lines, int(chunks[0].get("ncpus", 1))
