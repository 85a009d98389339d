"""What job_scripts/*.pbs promise, on two hosts and a stand-in for OpenPBS (pbs.py)."""

import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from hosts import Hosts, pid_of_rank, wait_for, why_not
from pbs import NODES, PBS
from stages import FOLDERS, ROOT, STEPS, metrics, worst_difference

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))

MULTI = "multinode_torchrun.pbs"


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository, so that jobs may write beside the scripts."""
    for folder in ("job_scripts", *FOLDERS.values()):
        shutil.copytree(ROOT / folder, tmp_path / "repository" / folder)
    return tmp_path / "repository"


@pytest.fixture
def pbs(tmp_path):
    hosts = Hosts(tmp_path)
    hosts("up")
    pbs = PBS(hosts)
    yield pbs
    pbs.close()
    hosts.down()


@pytest.fixture
def submit(pbs, repository, model, corpus):
    """Submit a job script with small data and one process per host; return the job's id."""

    def submit(script, *options, args=(), folder=None, **variables):
        flags = ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 4, "-e", "run", *args]
        values = {"VENV": sys.prefix, "NPROC": 1, "PREFLIGHT": 0, "ARGS": " ".join(map(str, flags))}
        values |= {"HF_HOME": os.environ["HF_HOME"]} | variables
        given = ",".join(f"{name}={value}" for name, value in values.items())
        small = ["-l", "select=2:ncpus=1:mpiprocs=1"]
        script = script if folder else f"job_scripts/{script}"
        return pbs.qsub(*small, *options, "-v", given, script, cwd=folder or repository)

    return submit


def output(repository, job_id, name="multinode", folder="."):
    return (repository / folder / f"{name}.o{re.match('[0-9]+', job_id)[0]}").read_text()


def leftovers(pbs):
    return [pid for host in NODES for pid in pbs.processes(host)]


def test_same_loss_curve_with_preflight(pbs, submit, repository, alone):
    began = time.monotonic()
    job = submit(MULTI, args=STEPS, PREFLIGHT=1)
    wait_for(lambda: (repository / "outputs/run/metrics.jsonl").exists())
    print("first", time.monotonic()-began)
    status = pbs.wait(job)
    print(time.monotonic()-began, output(repository, job))
    os.system(f"find {repository}/outputs; cat {repository}/outputs/jobs/*/*/*.log")
    assert status == 0
    assert worst_difference(metrics(alone), metrics(repository / "outputs/run")) < 1e-4
    assert leftovers(pbs) == []
