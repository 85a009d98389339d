"""Runs on pretended GPUs (pretended_gpu/), forked from a process that has the libraries."""

import json
import multiprocessing.forkserver
import os
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from unittest import mock

from lab.stages import LIBRARIES, ROOT, environment

PRETENDED = ROOT / "tests" / "lab" / "pretended_gpu"


def pretended(**env):
    """Return the environment of a run on two pretended GPUs."""
    return environment(**{"PYTHONPATH": PRETENDED, "PRETEND_GPUS": 2} | env)


def why_not():
    """Return why this torch cannot be made to believe in GPUs; None if it can."""
    probe = (
        "import os, torch\n"
        "x = torch.ones(2, device='cuda', requires_grad=True)\n"
        "x.sum().backward()\n"
        "os._exit(x.grad.device.type != 'cuda')\n"  # at once: the engine's thread is still there
    )
    words = [sys.executable, "-c", probe]
    done = subprocess.run(words, env=pretended(), capture_output=True, text=True)
    return f"pretended GPUs: {done.stderr[-300:]}" if done.returncode else None


@contextmanager
def forked_with_gpus():
    """Within this, what lab.stages forks has pretended GPUs, if its environment says so."""
    server = ForkServer()
    server.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, {"PRETEND_GPUS": "2", "PYTHONPATH": str(PRETENDED)}):
        server.ensure_running()
    connect = server.connect_to_new_process
    with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", connect):
        yield
    server._stop()


def waits_of(log, script):
    """Return each time that the CPU waited for the GPU: [(what, function, [lines of script])]."""
    found = []
    for line in log.read_text().splitlines():
        wait = json.loads(line)
        places = [place.rpartition(":") for place in wait["where"]]
        lines = [int(number) for file, _, number in places if Path(file) == script]
        found.append((wait["what"], wait["in"], lines))
    return found
