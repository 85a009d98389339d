"""What stage 01 promises, each promise run as a reader runs the script."""

import copy
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
import wandb
from stages import (
    ROOT,
    STEPS,
    command,
    environment,
    error_line,
    fork,
    metrics,
    notes_of,
    recorded,
    rows_read,
    same_weights,
    train,
    worst_difference,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_the_first_command_learns_writes_python_and_leaves_nothing(tmp_path):
    script = tmp_path / "01-single-gpu" / "train_llm.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "01-single-gpu" / "train_llm.py", script)
    done = subprocess.run(
        [sys.executable, script, "--max-steps", "300"],  # a quarter of the default
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"  loss ([\d.]+)", done.stderr)]
    val_losses = [float(loss) for loss in re.findall(r"val_loss ([\d.]+)", done.stderr)]
    assert len(losses) == 30 and len(val_losses) == 3
    assert losses[0] > 4 and sum(losses[-5:]) / 5 < 2.6 and val_losses[-1] < 2.6
    sample = done.stdout.split("The model writes:")[1]
    assert len(sample) > 200 and len(set(sample)) > 20
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train_llm.py"]


def run_and_kill(flags, ready):
    """Start stage 01 and kill it with SIGKILL as soon as ready() says so; False if it ended."""
    process = fork(command("01", *flags)[1:])
    while process.exitcode is None and not ready():
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_ten_times_ends_with_the_same_weights(flags, dropout_model, tmp_path):
    flags += ["-m", dropout_model, "--max-steps", 400, "--ckpt-freq", 7, "--log-freq", 2]
    train("01", *flags, "-e", "whole")
    log = tmp_path / "killed" / "metrics.jsonl"
    chance = random.Random(0)
    kills = 0
    for _ in range(10):
        begun, more = len(log.read_text()) if log.exists() else 0, chance.randint(1, 6000)
        kills += run_and_kill(
            [*flags, "-e", "killed"],
            lambda begun=begun, more=more: log.exists() and len(log.read_bytes()) > begun + more,
        )
    assert kills == 10, "it must not have finished before the last kill"
    train("01", *flags, "-e", "killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "killed")) == 0


def test_killed_while_saving_ends_with_the_same_weights(flags, wide_model, tmp_path):
    flags += ["-m", wide_model, "--max-steps", 8, "--ckpt-freq", 2, "-b", 2, "--log-freq", 1]
    train("01", *flags, "-e", "whole")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    partial = checkpoint.with_suffix(".partial")
    inside = 0
    for _ in range(20):
        run_and_kill(
            [*flags, "-e", "killed"],
            # The second checkpoint, so that there is one to lose.
            lambda: checkpoint.exists() and partial.exists() and partial.stat().st_size > 0,
        )
        inside += partial.exists()
        if inside:
            break
    assert inside, "no kill hit the saving of a checkpoint"
    train("01", *flags, "-e", "killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not partial.exists()


def test_full_disk_loses_nothing(flags, wide_model, tmp_path):
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("needs a mount namespace, which this machine does not allow")
    flags += ["-m", wide_model, "--max-steps", 6, "--ckpt-freq", 2, "-b", 2]
    train("01", *flags, "-e", "whole")
    disk = tmp_path / "disk"
    disk.mkdir()
    line = command("01", *flags, "-e", "full", "--save-dir", disk)
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size // 2**20
    script = f"""
        mount -t tmpfs -o size={size + 10}m tmpfs {disk}
        "$@" && exit 99  # the second checkpoint does not fit beside the first
        ls {disk}/full >&2
        mount -o remount,size=900m {disk}
        "$@" && cp {disk}/full/* {tmp_path}/whole/../copied"""
    (tmp_path / "copied").mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "-", *line],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "No space left on device" in error_line(done)
    assert "--save-dir" in error_line(done) and "make room" in error_line(done)
    assert "resuming after step 2" in done.stderr, done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "copied")


def test_accumulation_changes_nothing(flags, tmp_path):
    train("01", *flags, "-e", "at-once", "--max-steps", 16, "--log-freq", 1)
    for batch in (4, 2):
        more = ["-b", batch, "--global-batch-size", 8]
        train("01", *flags, "-e", f"by-{batch}", "--max-steps", 16, "--log-freq", 1, *more)
        one, other = metrics(tmp_path / "at-once"), metrics(tmp_path / f"by-{batch}")
        assert worst_difference(one, other) < 1e-4


def test_each_epoch_reads_every_row_once_in_a_new_order(flags, few_texts, tmp_path):
    line = command("01", *flags, "-d", few_texts, "--num-epochs", 2)
    env = recorded(tmp_path / "notes", ALONE=1)
    subprocess.run(line, env=env, check=True, capture_output=True)
    rows = rows_read(*notes_of(tmp_path / "notes", 1))
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
    assert first != second and len(first) % 8 == 0
    # All but the incomplete last global batch, which is left out.
    assert max(first) - len(first) < 8 and len(set(first) ^ set(second)) <= 16


def test_a_finished_run_says_so_and_more_steps_go_on(flags, tmp_path):
    flags += ["-e", "run", "--ckpt-freq", 5]
    train("01", *flags, "--max-steps", 10)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train("01", *flags, "--max-steps", 10)
    assert "already finished at step 10" in again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    more = train("01", *flags, "--max-steps", 20)
    assert "stretched over 20: the learning rate jumps at step 11" in more.stderr
    assert list(metrics(tmp_path / "run")) == [5, 10, 15, 20]


def test_resuming_late_costs_what_starting_costs(flags, tmp_path):
    """Read no row twice: the loader starts in the middle of the epoch, it does not skip."""
    flags += ["-e", "run", "--ckpt-freq", 50]
    train("01", *flags, "--max-steps", 50)
    env = recorded(tmp_path / "notes", ALONE=1)
    line = command("01", *flags, "--max-steps", 52)
    subprocess.run(line, env=env, check=True, capture_output=True)
    assert len(rows_read(*notes_of(tmp_path / "notes", 1))) == 2 * 8


@pytest.mark.parametrize(
    "flag, old, new",
    [
        ("--seed", 0, 1),
        ("--global-batch-size", 8, 16),
        ("--seq-length", 64, 32),
        ("--lr", 0.002, 0.001),
        ("--warmup-steps", 50, 40),
        ("--dtype", "fp32", "bf16"),
    ],
)
def test_resuming_with_another_flag_stops(flags, tmp_path, flag, old, new, finished):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    done = train("01", *flags, "-e", "run", "--max-steps", 9, flag, new, fails=True)
    assert flag in error_line(done)
    assert f"was {old} " in error_line(done) and f"is {new} now" in error_line(done)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.fixture(scope="module")
def finished(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    flags = ["-m", model, "-d", corpus / "corpus.jsonl", "-b", 8, "--save-dir", folder]
    train("01", *flags, "-e", "run", "--max-steps", 8)
    return folder / "run"


def test_resuming_with_another_model_or_other_data_stops(
    flags, finished, dropout_model, corpus, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    flags += ["-e", "run", "--max-steps", 9]
    done = train("01", *flags, "-m", dropout_model, fails=True)
    assert "--model-name was" in error_line(done)
    done = train("01", *flags, "-d", corpus / "text", fails=True)
    assert "--dataset-name was" in error_line(done)


def test_a_model_folder_with_another_model_in_it_stops_a_resume(flags, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    flags += ["-m", tmp_path / "model", "-e", "run"]
    train("01", *flags, "--max-steps", 2)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    line = error_line(train("01", *flags, "--max-steps", 3, fails=True))
    assert "holds a model of other sizes than --model-name" in line


def test_ctrl_c_says_how_to_go_on(flags, tmp_path):
    run = subprocess.Popen(
        command("01", *flags, "-e", "run", "--max-steps", 10000, "--log-freq", 1),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1 and "Traceback" not in errors
    assert "the same command goes on from the last checkpoint" in errors.splitlines()[-1]


def test_changed_contents_of_the_data_stop_a_resume(flags, texts, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags += ["-d", data, "-e", "run"]
    train("01", *flags, "--max-steps", 4)
    data.write_text("\n".join(json.dumps({"text": text.upper()}) for text in texts))
    assert "the data was" in error_line(train("01", *flags, "--max-steps", 5, fails=True))


def test_the_saved_model_loads_and_has_the_last_validation_loss(finished, corpus, texts):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.vocab_size % 128 == 0 and len(tokenizer) <= model.config.vocab_size
    rows = []
    for start in range(0, len(texts), 100):  # blocks of 100 documents, see load_data
        ids = [i for t in texts[start : start + 100] for i in [*tokenizer(t).input_ids[:-1], 1]]
        rows += [ids[i : i + 64] for i in range(0, len(ids) - 63, 64)]
    held_out = torch.tensor(rows[-(len(rows) // 100) :])
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    assert abs(loss - metrics(finished)[8]["val_loss"]) < 1e-4


def test_checkpoint_names_are_those_of_the_plain_model(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"].keys() == model.state_dict().keys()
    assert checkpoint["samples_seen"] == 64 and checkpoint["step"] == 8


def wandb_history(run):
    """Return the rows in the newest offline run of wandb (records in LevelDB's log format)."""
    from wandb.proto import wandb_internal_pb2

    data = max(run.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime).read_bytes()
    rows, whole, at = [], b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                pairs = [
                    (item.key or item.nested_key[0], item.value_json)
                    for item in record.history.item
                ]
                rows.append({k: json.loads(v) for k, v in pairs if not k.startswith("_")})
    return rows


def test_wandb_and_metrics_agree_also_after_a_resume(flags, tmp_path):
    flags += ["-e", "run", "--ckpt-freq", 4, "--log-freq", 2]
    for max_steps in (6, 12):
        train("01", *flags, "--max-steps", max_steps, env={"WANDB_MODE": None})
        assert wandb_history(tmp_path / "run") == list(metrics(tmp_path / "run").values())


def test_wandb_key_without_a_server_trains_offline(flags, tmp_path):
    env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= {"WANDB_MODE": None}
    done = train("01", *flags, "-e", "run", "--max-steps", 2, env=env, timeout=120)
    assert "wandb's server does not answer" in done.stderr
    assert wandb_history(tmp_path / "run") == list(metrics(tmp_path / "run").values())


def test_all_formats_give_the_same_rows(flags, corpus, tmp_path):
    for source in ("text", "corpus.jsonl", "tables", "tables/train.parquet"):
        name = source.replace("/", "-")
        train("01", *flags, "-d", corpus / source, "-e", name, "--max-steps", 2)
        one, other = metrics(tmp_path / "text"), metrics(tmp_path / name)
        assert worst_difference(one, other) == 0, source


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's CPU affinity")
def test_rows_do_not_depend_on_the_number_of_cpus(flags, tmp_path):
    ids = []
    for cpus in (1, min(2, os.cpu_count())):
        line = ["taskset", "--cpu-list", f"0-{cpus - 1}", *command("01", *flags, "--max-steps", 1)]
        env = environment(HF_HOME=tmp_path / f"cache-{cpus}")
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
        ids.append(re.search(r"data: (\d+ rows \w+)", done.stderr)[1])
    assert ids[0] == ids[1]


def test_hub_cold_then_warm_then_offline(flags, hub, tmp_path):
    flags += ["-m", "tiny/gpt", "-d", "tiny/corpus", "--max-steps", 3]
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "cache"}
    prepared = train("01", *flags, "--prepare-only", env=env)
    assert "everything is in the cache" in prepared.stderr and "step" not in prepared.stderr
    train("01", *flags, "-e", "warm", env=env)
    hub.shutdown()
    done = train("01", *flags, "-e", "offline", env=env | {"HF_HUB_OFFLINE": 1}, timeout=60)
    assert "tokenize" not in done.stderr
    assert worst_difference(metrics(tmp_path / "warm"), metrics(tmp_path / "offline")) == 0


def test_pretrained_starts_from_the_weights_on_the_hub(flags, hub, tmp_path):
    flags += ["-d", "tiny/corpus", "--max-steps", 1]
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "cache"}
    untrained = train("01", *flags, "-m", "tiny/gpt", "-e", "config", env=env)
    train("01", *flags, "-m", "tiny/gpt", "--pretrained", "-e", "weights", env=env)
    assert untrained.returncode == 0
    assert worst_difference(metrics(tmp_path / "config"), metrics(tmp_path / "weights")) > 1e-4


def test_unreachable_hub_is_said_within_seconds(flags, tmp_path):
    with socket.socket() as silent:  # a server that accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9"):
            env = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "cache"}
            started = time.monotonic()
            done = train("01", *flags, "-d", "tiny/corpus", env=env, fails=True)
            assert time.monotonic() - started < 30
            line = error_line(done)
            assert "tiny/corpus" in line and url in line and "--prepare-only" in line


def test_offline_without_the_cache_says_so(flags, tmp_path):
    env = {"HF_HUB_OFFLINE": 1, "HF_HOME": tmp_path / "cache"}
    line = error_line(train("01", *flags, "-m", "tiny/gpt", env=env, fails=True))
    assert "--model-name tiny/gpt" in line and "HF_HUB_OFFLINE" in line


def test_unknown_names_on_the_hub(flags, hub, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "cache"}
    for flag, name in (("-m", "tiny/nothing"), ("-d", "tiny/nothing"), ("-d", "corpus")):
        line = error_line(train("01", *flags, flag, name, env=env, fails=True, timeout=60))
        assert name in line and {"-m": "--model-name", "-d": "--dataset-name"}[flag] in line


def bad_data(tmp_path, name, contents):
    path = tmp_path / name
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize(
    "more, expected",
    [
        (["-b", 0], "--batch-size: must be at least 1, is 0"),
        (["--max-steps", -1], "--max-steps: must be at least 1, is -1"),
        (["--log-freq", 0], "--log-freq: must be at least 1"),
        (["--ckpt-freq", 0], "--ckpt-freq: must be at least 1"),
        (["--seq-length", "long"], "--seq-length: invalid"),
        (["--lr", 0], "--lr: must be more than 0"),
        (["--lr", "nan"], "--lr: must be more than 0"),
        (["--warmup-steps", -1], "--warmup-steps"),
        (["--global-batch-size", 12], "--global-batch-size 12 is not a multiple of --batch-size 8"),
        (["--seq-length", 65], "--seq-length 65: this model has 64 positions"),
        (["--profile"], "--profile needs --experiment-name"),
        (["--profile", "-e", "short", "--max-steps", 9], "--profile: needs 10 steps, and this run"),
        (["--global-batch-size", 8000], "not enough for one global batch of 8000"),
        (["-d", "./nope"], "--dataset-name ./nope: no such file or folder"),
        (["-d", "data/my/corpus.jsonl"], "--dataset-name data/my/corpus.jsonl: no such file"),
        (["-m", "~/nope"], "--model-name ~/nope: no such file or folder"),
        (["-d", "{empty.txt}"], "0 rows"),
        (["-d", "{empty.jsonl}"], "--dataset-name"),
        (["-d", "{empty-folder}"], "doesn't contain any data files"),
        (
            ["-d", "{two-columns.jsonl}"],
            "column 'text'; it has title (string), body (string)",
        ),
        (["-d", "{broken.jsonl}"], "JSON parse error"),
        (["-d", "{latin.txt}"], "'utf-8' codec can't decode byte 0xe9"),
        (["-m", "{empty-folder}"], "--model-name"),
        (["--save-dir", "{empty.txt}", "-e", "run"], "--save-dir: cannot write to"),
        (["--save-dir", "/proc", "-e", "run"], "--save-dir: cannot write to /proc/run"),
        (["-e", "../run"], "--experiment-name"),
        (["-e", ""], "--experiment-name '': must be a name"),
        (["--seq-length", 1], "--seq-length 1: must be at least 2"),
        (["-d", "{numbers.jsonl}"], "needs a column 'text'; it has text (int64)"),
    ],
)
def test_bad_input_gives_one_line(flags, tmp_path, more, expected):
    bad_data(tmp_path, "empty.txt", b"")
    bad_data(tmp_path, "empty.jsonl", b"")
    bad_data(tmp_path, "two-columns.jsonl", b'{"title": "a", "body": "b"}\n')
    bad_data(tmp_path, "numbers.jsonl", b'{"text": 1}\n')
    bad_data(tmp_path, "broken.jsonl", b'{"text": "a"}\n{"te')
    bad_data(tmp_path, "latin.txt", b"caf\xe9 " * 100)
    (tmp_path / "empty-folder").mkdir()
    more = [re.sub(r"{(.*)}", rf"{tmp_path}/\1", str(item)) for item in more]
    done = train("01", *flags, *more, "--no-compile", fails=True, timeout=60)
    assert expected in error_line(done)


def test_built_in_model_without_pretrained_weights(tmp_path):
    done = train("01", "--pretrained", fails=True)
    assert "--pretrained needs --model-name" in error_line(done)


def test_damaged_checkpoint_is_said_and_kept(flags, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    for contents in (checkpoint.read_bytes()[:5000], b"", b"not a checkpoint"):
        checkpoint.write_bytes(contents)
        done = train("01", *flags, "-e", "run", "--max-steps", 9, fails=True)
        assert "checkpoint.pt is damaged" in error_line(done)
        assert checkpoint.read_bytes() == contents


def test_half_a_line_of_metrics_is_dropped(flags, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    train("01", *flags, "-e", "run", "--max-steps", 9)
    assert list(metrics(tmp_path / "run")) == [8, 9]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(flags, tmp_path):
    flags += ["-e", "run", "--lr", 1e38, "--warmup-steps", 1, "--ckpt-freq", 1]
    line = error_line(train("01", *flags, "--max-steps", 9, fails=True))
    at = int(re.search(r"the loss is (?:nan|inf) at step (\d+): ", line)[1])
    assert "lower --lr" in line and str(tmp_path / "run" / "checkpoint.pt") in line
    assert list(metrics(tmp_path / "run")) == list(range(1, at))
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_out_of_memory_names_the_flags(flags, tmp_path):
    """No GPU here: the allocator's own exception, raised where a GPU would raise it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "def full(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory.')\n"
        "torch.Tensor.backward = full\n"
    )
    env = {"PYTHONPATH": tmp_path}
    line = error_line(train("01", *flags, "--max-steps", 1, env=env, fails=True))
    assert "lower --batch-size" in line and "--global-batch-size" in line


def test_bf16_and_compile_follow_the_same_curve(flags, tmp_path):
    # oneDNN is kept off AMX, which some virtual machines announce and do not have.
    env = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    flags += ["--max-steps", 4, "--log-freq", 1]
    train("01", *flags, "-e", "fp32", env=env)
    train("01", *flags, "-e", "bf16", "--dtype", "bf16", env=env)
    train("01", *flags, "-e", "compiled", "--compile", env=env, timeout=400)
    one = metrics(tmp_path / "fp32")
    assert worst_difference(one, metrics(tmp_path / "bf16"), keys=("loss",)) < 1e-3
    assert worst_difference(one, metrics(tmp_path / "compiled")) < 1e-4


def test_profile_shows_five_steps_and_changes_nothing(flags, alone, tmp_path):
    train("01", *flags, "-e", "run", *STEPS, "--profile")
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) == 0
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 5
    for bar in ("enumerate(DataLoader)", "aten::addmm", "Optimizer.step#AdamW.step"):
        assert any(name.startswith(bar) for name in names), bar


class NoLook(TorchDispatchMode):
    """Fails where the value of a tensor is read: on a GPU, the CPU would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar" not in str(function) and "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "olmo2", "qwen2", "qwen3"])
def test_attention_without_a_mask_is_the_attention_of_the_model(kind):
    check_attention(kind, NoLook())


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "doge"])
def test_models_with_other_masks_keep_them(kind):
    check_attention(kind, nullcontext())


def check_attention(kind, look):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"vocab_size": 384, "max_position_embeddings": 128, "word_embed_proj_dim": 64}
    config = AutoConfig.for_model(kind, **sizes)
    if kind in ("mistral", "gemma3_text"):
        config.sliding_window = 16
    build_model = runpy.run_path(f"{ROOT}/01-single-gpu/train_llm.py")["build_model"]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    torch.manual_seed(0)
    ours = build_model(Namespace(pretrained=False, model_name=kind), config).eval()
    ids = torch.randint(3, 380, (2, 64))
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        with look:
            assert torch.equal(ours(input_ids=ids, use_cache=False).logits, expected)


def test_of_a_long_history_wandb_gets_a_thousand_rows(monkeypatch):
    logged = []
    run = Namespace(log=lambda row, step: logged.append(step))
    start_wandb = runpy.run_path(f"{ROOT}/01-single-gpu/train_llm.py")["start_wandb"]
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    history = [{"step": step} for step in range(10, 100_001, 10)]
    start_wandb(Namespace(experiment_name=None), None, history)
    assert logged == list(range(100, 100_001, 100))
