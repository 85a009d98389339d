"""Small models and data for the tests, all made here, and caches apart from the reader's own."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset
from stages import STEPS, train
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A home folder without wandb's key, and a cache that all tests share."""
    home = tmp_path_factory.mktemp("home")
    os.environ["TEST_HOME"] = str(home)
    os.environ["HF_HOME"] = str(home / "huggingface")
    return home


@pytest.fixture(scope="session")
def texts():
    """260 documents: the sources of some packages of the standard library, in pieces."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    whole = "".join(
        path.read_text()
        for name in ("json", "email")
        for path in sorted((stdlib / name).glob("*.py"))
    )
    return [whole[i * 1000 : (i + 1) * 1000] for i in range(260)]


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


def make_model(folder, dropout, width=48):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


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
    """Stage 01's run of STEPS: the curve that all others must follow."""
    folder = tmp_path_factory.mktemp("alone")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "--save-dir", folder, "-e", "run"]
    train("01", *flags, *STEPS, "-b", 8)
    return folder / "run"


@pytest.fixture
def flags(model, corpus, tmp_path):
    """A run of seconds: 8 sequences of 64 tokens a step, in tmp_path."""
    return ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 8, "--save-dir", tmp_path]


@pytest.fixture
def hub(model, corpus, tmp_path):
    """The imitation of the hub, with tiny/gpt and tiny/corpus on it."""
    from hub_imitation import serve

    shutil.copytree(model, tmp_path / "hub/models/tiny/gpt")
    shutil.copytree(corpus / "tables", tmp_path / "hub/datasets/tiny/corpus/data")
    server = serve(tmp_path / "hub")
    yield server
    server.shutdown()
