"""The ranks of one run on this machine, each a process that a test can look into, or kill."""

import socket
import time

from lab.hosts import wait_for
from lab.stages import SHARDED, be_python, environment, forkserver, metrics


class Ranks:
    """The ranks of one run, with what torchrun would tell them, forked as stages.fork does it:
    importing the libraries in each of them would take most of the time."""

    def __init__(self, folder, processes, *flags, script=SHARDED, start=be_python):
        self.outputs = [folder / f"rank{rank}-{time.time_ns()}" for rank in range(processes)]
        self.processes = []
        with socket.create_server(("localhost", 0)) as free:
            meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
        for rank, path in enumerate(self.outputs):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            words = [str(script), *map(str, flags)]
            about = words, environment(**meet, **numbers), [path, path]
            self.processes.append(forkserver.Process(target=start, args=about))
            self.processes[-1].start()

    def end(self, timeout=240):
        """Wait for the ranks; return their exit statuses and what rank 0 has printed."""
        until = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0, until - time.monotonic()))
            return [p.exitcode for p in self.processes], self.outputs[0].read_text()
        finally:
            for process in self.processes:
                process.kill()


def train_sharded(folder, processes, *flags, script=SHARDED):
    """Run it to its end; return what rank 0 has printed."""
    codes, output = Ranks(folder, processes, *flags, script=script).end()
    assert codes == [0] * processes, output
    return output


def once_at_work(run_dir, more_steps=1):
    """Wait until the run has logged some steps more than now."""
    path = run_dir / "metrics.jsonl"
    before = len(metrics(run_dir)) if path.exists() else 0
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= before + more_steps)
