"""Small models and data for the tests, all made here, and caches apart from the reader's own."""

import json
import os
import shutil
import signal

import pytest
from datasets import Dataset
from lab.hosts import Hosts
from lab.hub_imitation import serve
from lab.material import make_model, source_code
from lab.stages import STEPS, environment, recorded, train


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A home folder without wandb's key, and a cache and a hub that all tests share."""
    home = tmp_path_factory.mktemp("home")
    os.environ["TEST_HOME"] = str(home)
    os.environ["HF_HOME"] = str(home / "huggingface")
    os.environ["HF_ENDPOINT"] = serve(home / "hub").url
    os.environ |= environment()  # for the process that some runs are forked from
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` ignores it, so all would
    return home


@pytest.fixture(scope="session")
def texts():
    """260 documents: the sources of some packages of the standard library, in pieces."""
    return source_code(260)


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    """The documents as a folder of text files, as jsonl and as parquet."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:03}.txt").write_text(text)
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "tables").mkdir()
    Dataset.from_dict({"text": texts}).to_parquet(folder / "tables" / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def few_texts(texts, tmp_path_factory):
    """So few that an epoch takes seconds."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts[:30]))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), dropout=0.0)


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("dropout-model"), dropout=0.1)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """Large enough (60 MB of checkpoint) that writing its checkpoint takes a while."""
    return make_model(tmp_path_factory.mktemp("wide-model"), dropout=0.1, width=448)


@pytest.fixture(scope="session")
def alone(model, corpus, tmp_path_factory):
    """Stage 01's run of STEPS: the curve that all others must follow.

    Beside it: its stderr, notes of the rows it read, and the same run, killed at the end of step 8.
    """
    folder = tmp_path_factory.mktemp("alone")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "--save-dir", folder, *STEPS, "-b", 8]
    done = train("01", *flags, "-e", "run", env=recorded(folder / "notes", ALONE=1))
    (folder / "stderr").write_text(done.stderr)
    train("01", *flags, "-e", "half", env=recorded(folder / "half-notes", DIE=1), fails=True)
    return folder / "run"


@pytest.fixture
def flags(model, corpus, tmp_path):
    """A run of seconds: 8 sequences of 64 tokens a step, in tmp_path."""
    return ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 8, "--save-dir", tmp_path]


@pytest.fixture
def hosts(tmp_path):
    """Two hosts on this machine, on which torchrun starts without the time of the imports."""
    hosts = Hosts(tmp_path, forked=True)
    hosts("up")
    yield hosts
    hosts.down()


@pytest.fixture(scope="session")
def hub(home, alone, corpus):
    """The hub's folder. On it are tiny/corpus and tiny/gpt, which has the weights of `alone`."""
    shutil.copytree(alone / "model", home / "hub/models/tiny/gpt")
    shutil.copytree(corpus / "tables", home / "hub/datasets/tiny/corpus/data")
    return home / "hub"


def pytest_terminal_summary(terminalreporter):
    """After test_gpu.py: what a reader with GPUs should send us."""
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" and "test_gpu.py" in report.nodeid
    ]
    if not reports:
        return
    from test_gpu import what_to_send

    terminalreporter.section("what to send us")
    for line in what_to_send():
        terminalreporter.line(line.strip())
    for report in reports:
        for name, value in report.user_properties:
            if name == "gpu":
                terminalreporter.line(value)
        terminalreporter.line(f"{report.outcome}: {report.nodeid.partition('::')[2]}")
