"""A real Slurm of two nodes, node1 and node2, and sshd on both, in the namespaces of two_hosts.sh.

Nothing of it is in the machine's own network, /run or /etc, so several can run side by side.
"""

import os
import shutil
import subprocess
import time

from lab.hosts import TWO_HOSTS, Hosts, wait_for
from lab.stages import environment

NODES = ("node1", "node2")
DAEMONS = ("munged", "slurmctld", "slurmd", "sshd")

# No cgroups, which containers may not have; more CPUs than the machine has, so that jobs can share
# a node; and a requeued job starts again after cred_expire (at least 5 s) instead of two minutes.
CONF = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=main Nodes=ALL Default=YES DefaultTime=10
NodeName=node[1-2] CPUs=8 RealMemory=64000 {gres}
"""

# What a login gives on these hosts: with one thread, nproc counts one core.
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
SetEnv OMP_NUM_THREADS=1 HF_HOME={cache} WANDB_MODE=disabled
"""

SSH = """
IdentityFile {folder}/user_key
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking no
LogLevel ERROR
"""

# Daemons get what they expect at the places where they expect it, on this host only.
HOST = """
mount -t tmpfs tmpfs /run
mount --bind "$1/etc" /etc/slurm
mkdir -p /run/munge /run/sshd "$1/spool-$(hostname)"
munged --key-file="$1/munge.key" --log-file="$1/munged-$(hostname).log" --seed-file=/run/munge/seed
[ "$(hostname)" != node1 ] || slurmctld
slurmd
sed 's/^root:[^:]*/root:*/' /etc/shadow > /run/shadow # no password, but not locked
mount --bind /run/shadow /etc/shadow
/usr/sbin/sshd -f "$1/sshd_config"
"""


class Slurm(Hosts):
    def up(self, gpus=2):
        """Start the cluster; return when both nodes are idle. gpus: pretended ones per node."""
        self("up")
        for name in ("etc", "state"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        gres = f"Gres=gpu:{gpus}\nGresTypes=gpu" if gpus else ""
        (self.folder / "etc/slurm.conf").write_text(CONF.format(folder=self.folder, gres=gres))
        devices = ["/dev/null", "/dev/zero"][:gpus]  # devices that every machine has
        (self.folder / "etc/gres.conf").write_text(
            f"Name=gpu File={','.join(devices)}\n" if gpus else ""
        )
        for name in ("host_key", "user_key"):
            path = self.folder / name
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", path], check=True)
        for name, text in {"sshd_config": SSHD, "ssh_config": SSH}.items():
            values = {"folder": self.folder, "cache": os.environ.get("HF_HOME")}
            (self.folder / name).write_text(text.format(**values))
        for node in NODES:
            self("run", node, "bash", "-euc", HOST, "-", self.folder)
        wait_for(
            lambda: (
                self("run", "node1", "sinfo", "-hNo", "%T", check=False).stdout.split()
                == ["idle", "idle"]
            ),
            timeout=30,
            what="two idle nodes",
        )

    def submit(self, script, *options, cwd, **env):
        """Run sbatch in the folder cwd on node1; return the job's number."""
        done = self.command("sbatch", "--parsable", *options, script, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def command(self, *words, cwd=None, **env):
        """Run a command on node1 and return what came of it."""
        return subprocess.run(
            [TWO_HOSTS, "run", "node1", *map(str, words)],
            env=environment(TWO_HOSTS=self.state, **env),
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def job(self, number):
        """Return what `scontrol show job` says of a job (or of array task 7_0) as a dictionary."""
        words = self.command("scontrol", "-o", "show", "job", number).stdout.split()
        return dict(word.partition("=")[::2] for word in words)

    def state_of(self, number):
        """Return a job's state and exit status, such as ("FAILED", "1:0")."""
        job = self.job(number)
        return job["JobState"], job["ExitCode"]

    def finish(self, *numbers, timeout=120):
        """Wait until jobs have ended; return their states and exit statuses."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        end = time.monotonic() + timeout
        while not all(self.state_of(number)[0] in ends for number in numbers):
            assert time.monotonic() < end, [self.job(number) for number in numbers]
            time.sleep(0.2)
        return [self.state_of(number) for number in numbers]

    def left_behind(self):
        """Return the processes on both hosts that are not the cluster's own."""
        own, lines = {*DAEMONS, "slurmscriptd", "sleep", "ps"}, []
        for node in NODES:
            table = self("run", node, "ps", "-wweo", "pid=,comm=,args=").stdout.splitlines()
            words = [line.split(maxsplit=2) for line in table]
            lines += [
                f"{node}: {line}" for pid, name, line in words if pid != "1" and name not in own
            ]
        return lines


def why_not_slurm():
    """Return why this machine cannot have a Slurm of two nodes; None if it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in (*DAEMONS, "sbatch", "ssh") if not shutil.which(name, path=path)]
    return f"install slurm-wlm, munge, openssh-server: no {', '.join(missing)}" if missing else None
