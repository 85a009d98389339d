"""What stage 01 promises, each promise run as a reader runs the script."""

import importlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from lab.stages import (
    FOLDERS,
    ROOT,
    STEPS,
    apply,
    blocks_of,
    command,
    environment,
    error_line,
    fork,
    metrics,
    notes_of,
    recorded,
    rows_read,
    run,
    same_weights,
    train,
    weights,
    worst_difference,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


@pytest.mark.slow
def test_the_first_command_learns_writes_python_and_leaves_nothing(tmp_path):
    script = tmp_path / "01-single-gpu" / "train_llm.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "01-single-gpu" / "train_llm.py", script)
    done = subprocess.run(
        [sys.executable, script, "--max-steps", "200"],  # a sixth of the default
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"  loss ([\d.]+)", done.stderr)]
    val_losses = [float(loss) for loss in re.findall(r"val_loss ([\d.]+)", done.stderr)]
    assert len(losses) == 20 and len(val_losses) == 2
    assert losses[0] > 4 and sum(losses[-5:]) / 5 < 2.6 and val_losses[-1] < 2.6
    samples = re.split("^-{40}\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(samples) == 3 and len("".join(samples)) > 200 and len(set("".join(samples))) > 20
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["train_llm.py"]


def test_the_log_shows_the_batches_and_the_rows_of_metrics(alone):
    log = (alone.parent / "stderr").read_text()
    assert re.search(r"--batch-size 8 x 1 micro-steps: 8 x 64 tokens per step, \d+ steps", log)
    assert f"step 0 of 16, folder: {alone}\n" in log
    for row in metrics(alone).values():
        assert "  ".join(f"{name} {value:.6g}" for name, value in row.items()) in log


@pytest.mark.parametrize("maker, more", [("01", []), ("04", ["--num-proc", 2])])
def test_rows_are_made_once_and_the_log_says_so(model, texts, tmp_path, maker, more):
    """By one process or several, also by those of mp.spawn; the others find them, whatever they
    say themselves."""
    rows = [json.dumps({"text": text}) for text in texts[:40]]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    flags = ["-m", model, "-d", tmp_path / "some.jsonl", "--max-steps", 1]
    runs = {maker: more, "02": [], "03": ["--num-proc", 3]}
    logs = [
        train(stage, *flags, *more, processes=1, forked=not more).stderr
        for stage, more in runs.items()
    ]
    assert [log.count("making the rows") for log in logs] == [1, 0, 0]


def test_other_rows_of_other_processes_stop_a_resume(flags, tmp_path):
    train("01", *flags, *STEPS, "-e", "run", "--max-steps", 8)
    elsewhere = {"HF_DATASETS_CACHE": tmp_path / "cache"}
    flags += [*STEPS, "-e", "run", "--num-proc", 2]
    refused = train("01", *flags, env=elsewhere, fails=True, forked=False)
    assert "error: the data was " in error_line(refused)


def test_a_kept_checkpoint_is_a_way_back(flags, alone, tmp_path):
    """By the commands of the README: with the same flags, and with another learning rate."""
    page = (ROOT / FOLDERS["01"] / "README.md").read_text()
    link = re.search(r"^ln -f .*", page, re.MULTILINE)[0]
    flags += [*STEPS, "--ckpt-freq", 4]
    train("01", *flags, "-e", "first", "--keep-every", 2)
    run_dir, kept = tmp_path / "first", ["checkpoint-16.pt", "checkpoint-8.pt"]
    assert sorted(path.name for path in run_dir.glob("checkpoint*")) == [*kept, "checkpoint.pt"]
    assert (run_dir / kept[0]).samefile(run_dir / "checkpoint.pt")  # no room of its own
    later = weights(run_dir)

    def typed(text):
        return text.replace("../outputs", str(tmp_path)).replace("-100.pt", "-8.pt")

    subprocess.run(typed(link), shell=True, check=True)
    assert torch.load(run_dir / "checkpoint.pt")["step"] == 8
    assert torch.load(run_dir / kept[0])["step"] == 16
    went_on = train("01", *flags, "-e", "first", "--keep-every", 2)
    assert "step 8 of 16" in went_on.stderr
    assert worst_difference(metrics(alone), metrics(run_dir)) == 0
    assert all(torch.equal(weights(run_dir)[name], later[name]) for name in later)
    assert torch.load(run_dir / kept[1])["step"] == 8

    programs = blocks_of("03-multi-node/reference.md", "python")
    (program,) = [program for program in programs if "gentler" in program]
    exec(typed(program), {})
    gentler = train("01", *flags, "-e", "gentler", "--lr", 5e-4)
    assert "step 8 of 16" in gentler.stderr
    runs = [metrics(tmp_path / run) for run in ("first", "gentler")]
    rates, slower = ([run[step]["lr"] for step in range(9, 17)] for run in runs)
    assert slower == pytest.approx([rate / 2 for rate in rates])
    assert list(metrics(tmp_path / "gentler")) == list(range(9, 17))


def run_and_kill(flags, ready, script=None):
    """Start stage 01 and kill it with SIGKILL as soon as ready() says so; False if it ended."""
    at, *words = command("01", *flags)[1:]
    process = fork([script or at, *words])
    while process.exitcode is None and not ready():
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_ten_times_ends_with_the_same_weights(flags, dropout_model, few_texts, tmp_path):
    flags += ["-m", dropout_model, "-d", few_texts]  # an epoch has some 60 steps
    flags += ["--max-steps", 400, "--ckpt-freq", 7, "--log-freq", 2]
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


@pytest.fixture(scope="module")
def wide(wide_model, corpus, tmp_path_factory):
    """The flags of a run whose checkpoint takes a while to write, and such a run."""
    folder = tmp_path_factory.mktemp("wide")
    flags = ["-m", wide_model, "-d", corpus / "corpus.jsonl", "-b", 2]
    flags += ["--max-steps", 8, "--ckpt-freq", 2, "--log-freq", 1]
    train("01", *flags, "--save-dir", folder, "-e", "whole")
    return flags, folder / "whole"


@pytest.mark.parametrize("script", ["the stage", "the exercise"])
def test_killed_while_saving_ends_with_the_same_weights(wide, tmp_path, script):
    """The stage, and the solution of the exercise that saves in the background."""
    flags, whole = [*wide[0], "--save-dir", tmp_path, "-e", "killed"], wide[1]
    path = str(ROOT / "01-single-gpu" / "train_llm.py")
    if script == "the exercise":
        (diff,) = blocks_of("01-single-gpu/README.md", "diff")
        source, path = Path(path).read_text(), str(tmp_path / "my_train_llm.py")
        Path(path).write_text(apply(diff, source))
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    partial = checkpoint.with_suffix(".partial")
    inside = 0
    for _ in range(20):
        run_and_kill(
            flags,
            # The second checkpoint, so that there is one to lose.
            lambda: checkpoint.exists() and partial.exists() and partial.stat().st_size > 0,
            path,
        )
        inside += partial.exists()
        if inside:
            break
    assert inside, "no kill hit the saving of a checkpoint"
    done = run([path, *flags], 180, environment())
    assert re.search("step [2-6] of 8, folder", done.stderr), done.stderr
    assert same_weights(whole, tmp_path / "killed")
    assert worst_difference(metrics(whole), metrics(tmp_path / "killed")) == 0
    assert not partial.exists()


def test_full_disk_loses_nothing(wide, tmp_path):
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"]).returncode:
        pytest.skip("needs a mount namespace, which this machine does not allow")
    flags, whole = wide
    disk = tmp_path / "disk"
    disk.mkdir()
    line = command("01", *flags, "-e", "full", "--save-dir", disk)
    size = (whole / "checkpoint.pt").stat().st_size // 2**20
    script = f"""
        mount -t tmpfs -o size={size + 10}m tmpfs {disk}
        "$@" && exit 99  # the second checkpoint does not fit beside the first
        ls {disk}/full >&2
        mount -o remount,size=900m {disk}
        "$@" && cp {disk}/full/checkpoint.pt {disk}/full/metrics.jsonl {tmp_path}"""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "-", *line],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr, done.stderr
    assert "step 2 of 8, folder" in done.stderr, done.stderr
    assert same_weights(whole, tmp_path)
    assert worst_difference(metrics(whole), metrics(tmp_path)) == 0


def test_accumulation_changes_nothing(flags, alone, tmp_path):
    for batch, micro_steps in ((4, 2), (2, 4)):
        done = train("01", *flags, *STEPS, "-e", f"by-{batch}", "-b", batch)
        assert f"--batch-size {batch} x {micro_steps} micro-steps: 8 x 64 tokens" in done.stderr
        assert worst_difference(metrics(alone), metrics(tmp_path / f"by-{batch}")) < 1e-4


def test_each_epoch_reads_every_row_once_in_a_new_order(flags, few_texts, tmp_path):
    env = recorded(tmp_path / "notes", ALONE=1)
    train("01", *flags, "-d", few_texts, "--num-epochs", 2, env=env)
    rows = rows_read(*notes_of(tmp_path / "notes", 1))
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
    assert first != second and len(first) % 8 == 0
    # All but the incomplete last global batch, which is left out.
    assert max(first) - len(first) < 8 and len(set(first) ^ set(second)) <= 16


def test_a_finished_run_goes_on_only_with_more_steps(flags, alone, tmp_path):
    """Late as it starts, it reads no row twice: the loader does not skip, it starts there."""
    shutil.copytree(alone, tmp_path / "run")
    flags += [*STEPS, "-e", "run"]
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')  # of a run that was killed
    again = train("01", *flags)
    assert "step 16 of 16" in again.stderr and "schedule" not in again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    env = recorded(tmp_path / "notes", ALONE=1)
    more = train("01", *flags, "--max-steps", 18, env=env)
    assert "step 16 of 18" in more.stderr
    assert more.stderr.count("the schedule was made for 16 steps: the learning rate jumps") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
    assert list(metrics(tmp_path / "run")) == list(range(1, 19))
    rows, earlier = rows_read(*notes_of(tmp_path / "notes", 1)), alone.parent / "notes"
    assert len(rows) == 2 * 8 and not set(rows) & set(rows_read(*notes_of(earlier, 1)))


def test_on_another_device_or_with_other_ranks_dropout_draws_anew(flags, dropout_model, tmp_path):
    """No GPU here: the checkpoint says that it comes from one, or from two ranks."""
    flags += ["-m", dropout_model, *STEPS]
    train("01", *flags, "-e", "here")
    state = torch.load(tmp_path / "here" / "checkpoint.pt")
    elsewhere = {
        "gpu": {"rng_of": ("cuda", 1), "rng": [torch.zeros(16, dtype=torch.uint8)]},
        "ranks": {"rng_of": ("cpu", 2), "rng": [torch.Generator().get_state()] * 2},
    }
    for name, rng in elsewhere.items():
        shutil.copytree(tmp_path / "here", tmp_path / name)
        torch.save(state | rng, tmp_path / name / "checkpoint.pt")
    for name in ("here", *elsewhere):
        train("01", *flags, "-e", name, "--max-steps", 24)
        assert torch.load(tmp_path / name / "checkpoint.pt")["rng_of"] == ("cpu", 1)
        assert worst_difference(metrics(tmp_path / "here"), metrics(tmp_path / name)) < 0.1
    assert same_weights(tmp_path / "gpu", tmp_path / "ranks")
    assert not same_weights(tmp_path / "here", tmp_path / "gpu")


def test_the_saved_model_loads_and_has_the_last_validation_loss(alone, texts):
    model = AutoModelForCausalLM.from_pretrained(alone / "model")
    tokenizer = AutoTokenizer.from_pretrained(alone / "model")
    assert model.config.vocab_size % 128 == 0 and len(tokenizer) <= model.config.vocab_size
    rows = []
    for start in range(0, len(texts), 1000):  # `datasets` hands out 1000 documents at a time
        ids = [i for t in texts[start : start + 1000] for i in [*tokenizer(t).input_ids[:-1], 1]]
        rows += [ids[i : i + 64] for i in range(0, len(ids) - 63, 64)]
    held_out = torch.tensor(rows[-(len(rows) // 100) :])
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    assert abs(loss - metrics(alone)[16]["val_loss"]) < 1e-4
    checkpoint = torch.load(alone / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"].keys() == model.state_dict().keys(), "those of the plain model"
    assert checkpoint["step"] == 16


def wandb_history(run):
    """Return {step: row} of wandb's offline runs (records in LevelDB's log format), old to new."""
    from wandb.proto import wandb_internal_pb2

    rows, whole = {}, b""
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        data, at = path.read_bytes(), 7
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind not in (1, 4):  # a whole record, or the last part of one
                continue
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = [(i.key or i.nested_key[0], i.value_json) for i in record.history.item]
                row = {key: json.loads(value) for key, value in items if not key.startswith("_")}
                rows[row["step"]] = row
    return rows


def test_wandb_and_metrics_agree_also_after_a_resume(flags, tmp_path):
    """And a server that does not answer is not asked: without WANDB_MODE a run stays offline."""
    flags += ["-e", "run", "--ckpt-freq", 4, "--log-freq", 2]
    env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": None}
    for max_steps in (6, 12):
        train("01", *flags, "--max-steps", max_steps, env=env, timeout=60)
        assert wandb_history(tmp_path / "run") == metrics(tmp_path / "run")
    assert list(metrics(tmp_path / "run")) == [2, 4, 6, 8, 10, 12]


def test_all_formats_give_the_same_rows(flags, alone, corpus):
    rows = torch.load(alone / "checkpoint.pt")["flags"]["the data"]
    for source in ("text", "tables", "tables/train.parquet", "corpus.jsonl"):
        done = train("01", *flags, "-d", corpus / source, "--prepare-only")
        assert done.stdout.endswith(f": {rows}\n"), source


def on_a_terminal(words):
    """Run a script with its flags; return what its stderr shows on a terminal."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 160))
    process, shown = fork(words, (os.devnull, os.ttyname(slave))), b""
    while select.select([master], [], [], 0.1)[0] or process.exitcode is None:
        shown += os.read(master, 65536) if select.select([master], [], [], 0)[0] else b""
    os.close(master)
    os.close(slave)
    assert process.exitcode == 0, shown
    return shown.decode()


def test_progress_bars_on_a_terminal_and_none_in_a_log_file(flags, corpus, tmp_path):
    for name in ("log.jsonl", "terminal.jsonl"):  # neither is in the cache
        shutil.copy(corpus / "corpus.jsonl", tmp_path / name)
    quiet = {"TQDM_DISABLE": 1}  # as in the job scripts
    done = train("01", *flags, *STEPS, "-d", tmp_path / "log.jsonl", env=quiet)
    assert not re.search(r"\r|%\||it/s", done.stderr) and done.stderr.count("  loss ") == 16
    shown = on_a_terminal(command("01", *flags, *STEPS, "-d", tmp_path / "terminal.jsonl")[1:])
    assert shown.count("  loss ") == 16 and "Map: 100%|" in shown
    # The steps done, the time taken and left.
    assert re.search(r"\d+/16 \[\d\d:\d\d<\d\d:\d\d, .*step/s\]", shown), shown


def test_hub_unreachable_and_cold_then_warm_then_offline(flags, hub, alone, tmp_path):
    """--pretrained: the warm-up begins at 0, so that one step leaves the weights as they were."""
    flags += ["--max-steps", 1]
    unreachable = subprocess.Popen(  # `datasets` tries it for half a minute
        command("01", *flags, "-d", "tiny/unseen"),
        env=environment(HF_ENDPOINT="http://127.0.0.1:9"),
        stderr=subprocess.PIPE,
        text=True,
    )
    flags += ["-m", "tiny/gpt", "-d", "tiny/corpus"]
    train("01", *flags, "-e", "untrained")
    flags += ["--pretrained"]
    prepared = train("01", *flags, "--prepare-only")
    assert "in the cache, also for jobs with HF_HUB_OFFLINE=1: " in prepared.stdout
    assert "step" not in prepared.stderr
    train("01", *flags, "-e", "warm")
    env = {"HF_HUB_OFFLINE": 1, "HF_ENDPOINT": "http://127.0.0.1:9"}
    train("01", *flags, "-e", "offline", env=env, timeout=60)
    assert worst_difference(metrics(tmp_path / "warm"), metrics(tmp_path / "offline")) == 0
    loss, untrained = (metrics(tmp_path / run)[1]["val_loss"] for run in ("warm", "untrained"))
    assert abs(loss - metrics(alone)[16]["val_loss"]) < 1e-5
    assert untrained > metrics(alone)[8]["val_loss"]
    errors = unreachable.communicate(timeout=120)[1]
    assert unreachable.returncode != 0
    assert re.match("ConnectionError: Couldn't reach 'tiny/unseen' on the Hub", last_words(errors))


def test_bf16_and_compile_follow_the_same_curve(flags, alone, tmp_path):
    # oneDNN is kept off AMX, which some virtual machines announce and do not have.
    env = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    flags += STEPS
    train("01", *flags, "-e", "bf16", "--dtype", "bf16", env=env)
    train("01", *flags, "-e", "compiled", "--compile", env=env, timeout=400)
    assert worst_difference(metrics(alone), metrics(tmp_path / "bf16"), keys=("loss",)) < 1e-3
    assert worst_difference(metrics(alone), metrics(tmp_path / "compiled")) < 1e-4


def test_profile_shows_five_steps_and_changes_nothing(flags, alone, tmp_path):
    train("01", *flags, "-e", "run", *STEPS, "--profile")
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) == 0
    (trace,) = (tmp_path / "run").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 5
    for bar in ("enumerate(DataLoader)", "aten::addmm", "Optimizer.step#AdamW.step"):
        assert any(name.startswith(bar) for name in names), bar


# What would go wrong silently: {what: (flags, the line that refuses it)}, of a run of 16 steps in
# whose folder the finished run `alone` is. TEXT: a folder with the same data in it.
SILENT = {
    "other seed": (["--seed", 1], "--seed was 0 when .*run/checkpoint.pt was written and is 1 now"),
    "other batch": (["--global-batch-size", 16], "--global-batch-size was 8 when .* is 16 now"),
    "other length": (["--seq-length", 32], "--seq-length was 64 when .* and is 32 now"),
    "other lr": (
        ["--lr", 0.002],
        "--lr was 0.001 when .* is 0.002 now: put the old value back, or",
    ),
    "other warm-up": (["--warmup-steps", 40], "--warmup-steps was 50 when .* and is 40 now"),
    "other dtype": (["--dtype", "bf16"], "--dtype was fp32 when .* and is bf16 now"),
    "other model": (["-m", "DROPOUT"], "--model-name was .* and is .*dropout-model.* now"),
    "pretrained now": (["--pretrained"], "--pretrained was False when .* and is True now"),
    "other data": (["-d", "TEXT"], "--dataset-name was .*corpus.jsonl when .* and is .*text now"),
    "batch": (["-b", 3], "--global-batch-size 8 is no multiple of --batch-size 3"),
    "few data": (["--global-batch-size", 8000], r"\d+ rows, less than two global batches"),
    "length": (["--seq-length", 65], "--seq-length 65: the model has 64 positions"),
    "no such model": (["-m", "~/nope"], "no such file or folder: ~/nope"),
    "no such data": (["-d", "./nope"], "no such file or folder: ./nope"),
    "pretrained": (["-m", "", "--pretrained"], "--pretrained needs --model-name"),
    "profile": (["-e", "", "--profile"], "--profile needs --experiment-name"),
}


def refuse(stage, processes, flags, expected, run):
    """A stage ends before the first step, says why in one line, and leaves the run as it was."""
    before = [(run / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl")]
    done = train(stage, *flags, processes=processes, fails=True, timeout=60)
    said = {line[line.find("error: ") :] for line in done.stderr.splitlines() if "error: " in line}
    assert len(said) == 1 and re.search(expected, *said), done.stderr
    assert "  loss " not in done.stderr
    assert before == [(run / name).read_bytes() for name in ("checkpoint.pt", "metrics.jsonl")]
    return done


@pytest.mark.parametrize("what", SILENT)
def test_silent_fault_is_refused_in_one_line(flags, alone, corpus, dropout_model, tmp_path, what):
    shutil.copytree(alone, tmp_path / "run")
    (more, expected), names = SILENT[what], {"TEXT": corpus / "text", "DROPOUT": dropout_model}
    flags += [*STEPS, "-e", "run", *(names.get(word, word) for word in more)]
    assert "Traceback" not in refuse("01", 1, flags, expected, tmp_path / "run").stderr


def test_changed_contents_of_the_data_stop_a_resume(flags, texts, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    flags += ["-d", data, "-e", "run"]
    train("01", *flags, "--max-steps", 2)
    data.write_text("\n".join(json.dumps({"text": text.upper()}) for text in texts))
    expected = r"the data was \d+ rows \w+ when .* and is \d+ rows \w+ now"
    refuse("01", 1, [*flags, "--max-steps", 3], expected, tmp_path / "run")


@pytest.mark.parametrize("contents", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_damaged_checkpoint_is_said_and_kept(flags, alone, tmp_path, contents):
    shutil.copytree(alone, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000] if contents is None else contents)
    refuse("01", 1, [*flags, *STEPS, "-e", "run"], "checkpoint.pt is damaged: ", tmp_path / "run")


def diverge(stage, processes, flags, run):
    """A loss that is no number ends the run, and the last checkpoint is that of the step before."""
    flags = [*flags, "-e", run.name, "--lr", 1e38, "--warmup-steps", 1, "--ckpt-freq", 1]
    done = train(stage, *flags, "--max-steps", 9, processes=processes, fails=True, timeout=60)
    at = int(re.search(r"error: not finite: step (\d+)  loss .* a lower --lr", done.stderr)[1])
    assert list(metrics(run)) == list(range(1, at))
    kept = torch.load(run / "checkpoint.pt")
    assert kept["step"] == at - 1
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(flags, tmp_path):
    diverge("01", 1, flags, tmp_path / "run")


# What fails loudly, by whatever library notices: {what: (flags, its last words)}.
LOUD = {
    "unknown model": (
        ["-m", "tiny/nope"],
        "OSError: tiny/nope is not a local folder and is not a valid model identifier",
    ),
    "unknown data": (
        ["-d", "tiny/nope"],
        "DatasetNotFoundError: Dataset 'tiny/nope' doesn't exist on the Hub or cannot be accessed",
    ),
    "missing file": (
        ["-d", "data/my/corpus.jsonl"],
        "FileNotFoundError: Couldn't find any data file at .*/data/my/corpus.jsonl",
    ),
    "no text": (
        ["-d", "no-text.jsonl"],
        r"ValueError: Column name \['text'\] not in the dataset. .*\['title', 'body'\]",
    ),
    "empty file": (["-d", "empty.txt"], "empty.txt: 0 rows, less than two"),
    "empty folder": (["-d", "empty"], r"ValueError: Empty 'data_files': '\[\]'"),
    "not JSON": (["-d", "broken.jsonl"], "DatasetGenerationError: An error .* generating the dat"),
    "not UTF-8": (["-d", "latin.txt"], "DatasetGenerationError: An error .* generating the dat"),
    "folder": (["--save-dir", "/proc", "-e", "run"], "No such file or directory: '/proc/run'"),
    "a file": (["--save-dir", "latin.txt", "-e", "run"], "Not a directory: .*latin.txt/run'"),
    "name": (["-e", "a:b"], "UsageError: Run ID cannot contain the characters"),
    "two lengths": (["--num-epochs", 2], "--num-epochs: not allowed with argument --max-steps"),
}
CAUSES = {"not JSON": "JSON parse error", "not UTF-8": "'utf-8' codec can't decode byte 0xe9"}


def last_words(errors):
    """Return the last exception's type and message, or the last line."""
    lines = errors.splitlines()
    start = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "\n".join(lines[start[-1] if start else -1 :])


@pytest.mark.parametrize("what", LOUD)
def test_loud_fault_ends_with_a_true_last_line(flags, tmp_path, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "no-text.jsonl").write_bytes(b'{"title": "a", "body": "b"}\n')
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "a"}\n{"te')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    more, expected = LOUD[what]
    more = [tmp_path / word if (tmp_path / str(word)).exists() else word for word in more]
    done = train("01", *flags, "--max-steps", 2, *more, fails=True, timeout=60)
    assert re.search(expected, last_words(done.stderr)), done.stderr
    assert CAUSES.get(what, "") in done.stderr


def test_a_model_folder_with_another_model_in_it_stops_a_resume(flags, model, alone, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    flags += ["-m", tmp_path / "model", "-e", "run"]
    train("01", *flags, "--max-steps", 2)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    done = train("01", *flags, "--max-steps", 3, fails=True)
    assert 'Unexpected key(s) in state_dict: "transformer.h.1.' in last_words(done.stderr)


class NoLook(TorchDispatchMode):
    """Fails where the value of a tensor is read: on a GPU, the CPU would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar" not in str(function) and "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def load_model(monkeypatch):
    """Stage 01's; what it replaces in the library is put back afterwards."""
    masking = transformers.masking_utils
    find, mask = masking.find_packed_sequence_indices, masking.sdpa_mask
    monkeypatch.syspath_prepend(ROOT / "01-single-gpu")
    yield importlib.import_module("train_llm").load_model
    del sys.modules["train_llm"]
    masking.find_packed_sequence_indices = find
    transformers.AttentionMaskInterface.register("sdpa", mask)


def small_model(kind, folder):
    """Return a small model of a kind as the library makes it; put its config into folder."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"sliding_window": 16} if kind in ("mistral", "gemma3_text") else {}
    config = AutoConfig.for_model(kind, vocab_size=384, max_position_embeddings=128, **sizes)
    config.save_pretrained(folder)
    letters = Tokenizer(BPE({chr(i): i for i in range(256)}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def as_stage_01_makes_it(folder, load_model):
    torch.manual_seed(0)
    model, _ = load_model(Namespace(model_name=folder, pretrained=False, seq_length=None))
    return model.eval()


PLAIN = ["gpt2", "gpt_neox", "llama", "olmo2", "qwen2", "qwen3"]
OTHER = ["mistral", "gemma3_text", "doge", "bloom"]  # a window, a mask of their own, or eager


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
@torch.no_grad()
def test_attention_without_a_mask_is_the_attention_of_the_model(kind, load_model, tmp_path):
    torch.manual_seed(1)
    ids = torch.randint(3, 380, (2, 64))
    expected = small_model(kind, tmp_path)(input_ids=ids, use_cache=False).logits
    model = as_stage_01_makes_it(tmp_path, load_model)
    with NoLook() if kind in PLAIN else nullcontext():
        logits = model(input_ids=ids, labels=ids, use_cache=False).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_compiled_attention_gets_no_mask(kind, load_model, tmp_path):
    """With one there is no flash attention. The library alone would make one."""
    masks = []

    def look(graph, inputs):
        function = torch.nn.functional.scaled_dot_product_attention
        calls = [node.kwargs for node in graph.graph.nodes if node.target is function]
        masks.append([(call["attn_mask"] is not None, call["is_causal"]) for call in calls])
        return graph.forward

    ids = torch.ones(2, 64, dtype=torch.long)
    model = small_model(kind, tmp_path)
    torch.compile(model, backend=look)(input_ids=ids, use_cache=False)
    torch.compiler.reset()
    model = as_stage_01_makes_it(tmp_path, load_model)
    torch.compile(model, backend=look)(input_ids=ids, labels=ids, use_cache=False)
    assert masks == [[(True, False)] * 2, [(False, True)] * 2]
