"""The GPU path. On a machine with GPUs: pytest tests/test_gpu.py, which ends with what to send us.

Elsewhere the same tests are slow ones, on pretended GPUs (lab/pretended_gpu). They show on which
device a tensor is, what a collective is given, where random numbers come from, what is saved and
comes back, and where the CPU would wait; what needs kernels, NCCL or a compiler is left out there.
"""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from lab.hosts import descendants, wait_for
from lab.material import make_model, make_of_kind
from lab.pretended import PRETENDED, forked_with_gpus, pretended, waits_of, why_not
from lab.stages import (
    FOLDERS,
    ROOT,
    SCRIPTS,
    STEPS,
    TWO_D,
    command,
    environment,
    metrics,
    replaced,
    run,
    worst_difference,
)
from transformers import ByT5Tokenizer, GPT2Config

REAL = torch.cuda.device_count() if torch.cuda.is_available() else 0
COUNT = REAL or 2
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(REAL))))
EXACT = ["--dtype", "fp32", "--no-compile"]  # as on the CPU
REASON = None if REAL else why_not()
pytestmark = [pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))]
pytestmark += [] if REAL else [pytest.mark.slow]
needs_kernels = pytest.mark.skipif(not REAL, reason="no GPU: nothing that could be pretended")
TWO = pytest.mark.skipif(COUNT < 2, reason="one GPU")
STAGES = [pytest.param(s, marks=[] if s == "01" else TWO) for s in SCRIPTS]


@pytest.fixture(scope="module", autouse=True)
def gpus(alone):
    """What is forked from here on has GPUs; so the run of the CPU must have been before."""
    if REAL:
        yield
    else:
        with forked_with_gpus():
            yield


def on_gpus(ranks=1, **env):
    """Return the environment of a run that may use so many GPUs."""
    if not REAL:
        return pretended(**env)
    real = {"CUDA_VISIBLE_DEVICES": ",".join(VISIBLE.split(",")[:ranks]), "PYTHONPATH": PRETENDED}
    return environment(**real | env)


def words_of(stage, *flags, ranks=None, script=None):
    """Return what python is given to run a stage (or a changed copy) in two micro-steps of 8 rows
    in all; from 02 on with 2 ranks."""
    ranks = ranks or (1 if stage == "01" else 2)
    words = command(stage, *flags, "-b", 4 // ranks, processes=ranks)[1:]
    words[words.index(str(SCRIPTS[stage]))] = script or SCRIPTS[stage]
    return words


def start(stage, *flags, ranks=None, script=None, env=None, **options):
    """Run a stage to its end; return as lab.stages.run does."""
    words = words_of(stage, *flags, ranks=ranks, script=script)
    forked = not REAL and stage != "04"
    return run(words, 300, on_gpus(ranks or 2, **(env or {})), forked=forked, **options)


@pytest.mark.parametrize("stage", STAGES)
def test_float32_gives_the_curve_of_the_cpu(stage, flags, alone, tmp_path):
    """And the CPU does not wait for the GPU between the head of the loop and its `continue`."""
    log = tmp_path / "waits"
    start(stage, *flags, *STEPS, *EXACT, "-e", "run", env={"WAITS": log})
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"{stage}: {difference:.1e}")
    assert difference < (1e-3 if REAL else 1e-5)
    assert_no_wait_in_the_loop(log, SCRIPTS[stage])


@TWO
def test_layers_that_gpus_share_give_the_same_losses(flags, tmp_path):
    make_of_kind(tmp_path / "llama", "llama", num_key_value_heads=2)
    flags = [*flags, "-m", tmp_path / "llama", *STEPS, *EXACT]
    start("01", *flags, "-e", "alone")
    log = tmp_path / "waits"
    start("sharded", *flags, "--recompute", "-e", "run", script=TWO_D, env={"WAITS": log})
    difference = worst_difference(metrics(tmp_path / "alone"), metrics(tmp_path / "run"))
    print(f"1 x 2: {difference:.1e}")
    assert difference < (1e-3 if REAL else 1e-5)
    assert_no_wait_in_the_loop(log, TWO_D)


def assert_no_wait_in_the_loop(log, script):
    lines = script.read_text().splitlines()
    head = lines.index("    while step < total_steps:") + 1
    end = lines.index("            continue", head) + 1
    waits = waits_of(log, script)
    assert waits, "the log line is made of values"
    for what, function, places in waits:
        in_loop = any(head <= line <= end for line in places)
        # Once, at the second forward pass, DDP's ranks agree on the order of its buckets.
        assert places and (not in_loop or function == "_pre_forward"), (what, function, places)


# Not 04 on pretended GPUs: it saves and loads what 03 does, and its new processes take minutes.
@pytest.mark.parametrize("stage", [s for s in STAGES if REAL or "04" not in str(s)])
def test_a_killed_run_goes_on_with_the_same_numbers(stage, flags, dropout_model, tmp_path):
    flags = [*flags, *STEPS, "--dtype", "bf16", "--no-compile", "-m", dropout_model]
    killed_and_resumed(stage, flags, tmp_path)
    difference = worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run"))
    print(f"{stage}: {difference:.1e}")
    assert difference <= (1e-2 if REAL else 0)  # some kernels add in an order that changes


def killed_and_resumed(stage, flags, folder, **options):
    start(stage, *flags, "-e", "whole", **options)
    (folder / "notes").mkdir()
    dies = {"RECORD": folder / "notes", "DIE": 1, "ALONE": 1}
    start(stage, *flags, "-e", "run", env=dies, fails=True, **options)
    start(stage, *flags, "-e", "run", **options)


def test_the_preflight_says_fit_to_train(tmp_path):
    text = (ROOT / FOLDERS["03"] / "check_cluster.py").read_text()
    script = tmp_path / "check_cluster.py"
    script.write_text(text if REAL else text.replace("8192", "256"))  # a product of matrices
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", COUNT, script]
    done = run([*line, "--save-dir", tmp_path], 200, on_gpus(COUNT), forked=not REAL)
    assert f"fit to train: {COUNT} rank" in done.stdout, done.stdout + done.stderr
    assert REAL or done.stdout.count("pretended GPU") >= 2


@TWO
def test_the_reference_s_lines_for_other_accelerators_give_the_same_losses(flags, alone, tmp_path):
    page = (ROOT / FOLDERS["03"] / "reference.md").read_text()
    block = re.search(r"\*\*Intel GPUs\*\*.*?```diff\n(.*?)```", page, re.DOTALL)[1]
    changes = re.findall(r"((?:  -.*\n)+)((?:  \+.*\n)+)", block)
    changes = [[re.sub("^  [-+]", "", lines, flags=re.MULTILINE) for lines in c] for c in changes]
    text = replaced(SCRIPTS["03"].read_text(), *changes)
    assert "torch.cuda" not in text
    (tmp_path / "train_llm.py").write_text(text)
    start("03", *flags, *STEPS, *EXACT, "-e", "run", script=tmp_path / "train_llm.py")
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < (1e-3 if REAL else 1e-5)


# Faults that the tests above must find.


def planted(folder, stage, old, new):
    """Return a copy of a stage's script in which old has become new."""
    script = folder / "planted" / "train_llm.py"
    script.parent.mkdir()
    script.write_text(replaced(SCRIPTS[stage].read_text(), (old, new)))
    return script


def test_dropout_of_the_wrong_generator_is_found(flags, dropout_model, tmp_path):
    """No test on a CPU can see it."""
    script = planted(tmp_path, "01", "torch.cuda if on_gpu else torch ", "torch ")
    flags = [*flags, *STEPS, "--dtype", "bf16", "--no-compile", "-m", dropout_model]
    killed_and_resumed("01", flags, tmp_path, script=script)
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "run")) > 0


@TWO
def test_a_value_that_is_read_at_every_step_is_found(flags, tmp_path):
    script = planted(tmp_path, "02", "loss_sum += loss.detach()", "loss_sum += loss.item()")
    log = tmp_path / "waits"
    start("02", *flags, *STEPS, *EXACT, script=script, env={"WAITS": log})
    with pytest.raises(AssertionError, match="read"):
        assert_no_wait_in_the_loop(log, script)


STOP = "stop = torch.tensor(max(signals), device=device)"
PLANTED = {
    "a collective of a CPU tensor": (STOP, STOP.replace(", device=device", ""), "type cpu"),
    "a model left on the CPU": ("model.to(device).train()", "model.train()", "type cpu|same dev"),
    "a checkpoint on the GPU": ('map_location="cpu"', 'map_location="cuda"', "must be a torch.By"),
}


@TWO
@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_on_the_wrong_device_is_found(flags, tmp_path, fault):
    old, new, found = PLANTED[fault]
    script = planted(tmp_path, "03", old, new)
    flags = [*flags, *STEPS, *EXACT, "-e", "run"]
    if "checkpoint" in fault:
        start("03", *flags, "--max-steps", 8)
    done = start("03", *flags, script=script, fails=True)
    assert re.search(found, done.stderr), done.stderr


def test_the_rank_as_the_number_of_the_gpu_is_found(flags, tmp_path):
    """On the second of two nodes, the first rank is local rank 0."""
    device = 'torch.device("cuda", local_rank)'
    script = planted(tmp_path, "03", device, device.replace("local_", ""))
    place = {"RANK": COUNT, "LOCAL_RANK": 0, "WORLD_SIZE": 2 * COUNT}
    done = run([script, *flags], 100, on_gpus(COUNT, **place), fails=True, forked=not REAL)
    assert "invalid device ordinal" in done.stderr, done.stderr


# What needs the real thing.


@needs_kernels
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_reader_gets_by_default_trains(stage, flags, alone, tmp_path):
    """bf16 and compiled, in two micro-steps; fp32 for comparison."""
    done = start(stage, *flags, *STEPS, "-e", "run")
    assert ", bf16 on cuda" in done.stderr
    exact, mine = metrics(alone), metrics(tmp_path / "run")
    assert all(math.isclose(mine[step]["loss"], exact[step]["loss"], rel_tol=0.05) for step in mine)
    assert mine[16]["loss"] < mine[1]["loss"]


@needs_kernels
@pytest.mark.parametrize("stage", ["02", "03", "04", "sharded"])
def test_one_process_with_nccl_is_stage_01(stage, flags, tmp_path):
    start("01", *flags, *STEPS, *EXACT, "-e", "one")
    start(stage, *flags, *STEPS, *EXACT, "-e", "run", ranks=1)
    assert worst_difference(metrics(tmp_path / "one"), metrics(tmp_path / "run")) < 1e-4


def endless(stage, flags, folder, ranks):
    """Start an endless run in new processes; return it, once it trains, and its ranks' pids."""
    more = ["--max-steps", 10**6, "--log-freq", 5, "--ckpt-freq", 10**6, "-e", "run"]
    more += ["--timeout", 20, *EXACT]
    words = words_of(stage, *flags, *more, ranks=ranks)
    with open(folder / "output", "w") as file:
        line = [sys.executable, *map(str, words)]
        process = subprocess.Popen(line, env=on_gpus(ranks), stdout=file, stderr=file)
    rows = folder / "run" / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or rows.exists() and len(metrics(rows.parent)) > 2)
    ours = [pid for pid in descendants(process.pid) if pid != process.pid]
    ranks_of = {}
    for pid in ours:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if found := re.search(rb"\0RANK=(\d+)\0", b"\0" + file.read()):
                ranks_of[int(found[1])] = pid
    assert process.poll() is None and len(ranks_of) == ranks, (folder / "output").read_text()
    return process, [ranks_of[rank] for rank in range(ranks)]


@pytest.mark.parametrize("stage", ["03", pytest.param("sharded", marks=needs_kernels)])
def test_sigterm_saves_and_stops_all(stage, flags, tmp_path):
    process, pids = endless(stage, flags, tmp_path, min(2, COUNT))
    os.kill(pids[-1], signal.SIGTERM)
    assert process.wait(60) != 0
    assert "stopped by SIGTERM after step" in (tmp_path / "output").read_text()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@needs_kernels
@TWO
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_other(flags, tmp_path, number, record_property):
    """Killed: torchrun ends it. Frozen: NCCL's watchdog does, after --timeout."""
    process, pids = endless("03", flags, tmp_path, 2)
    began = time.monotonic()
    os.kill(pids[1], number)
    assert process.wait(150) != 0
    said = f"{number.name} of a rank: all ended after {time.monotonic() - began:.0f} s"
    print(said, (tmp_path / "output").read_text()[-6000:], sep="\n")
    record_property("gpu", said)


@needs_kernels
@pytest.mark.parametrize("order", ["GPU, CPU", "CPU, GPU"])
def test_a_run_moves_between_gpu_and_cpu(flags, alone, tmp_path, order):
    for steps, place in zip((8, 16), order.split(", "), strict=True):
        more = [*STEPS, *EXACT, "--max-steps", 16, "-e", "run"]
        dies = {"RECORD": tmp_path / f"notes{steps}", "ALONE": 1}
        dies |= {"DIE": 1} if steps == 8 else {}
        dies["RECORD"].mkdir()
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if place == "CPU" else {}
        start("01", *flags, *more, env=dies | hidden, fails=steps == 8)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-3


@needs_kernels
def test_too_little_memory_says_so(flags, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.set_per_process_memory_fraction(0.001)\n"
    )
    wide = make_model(tmp_path / "wide", dropout=0.0, width=1024)
    flags = [*flags, *STEPS, "-m", wide, "--global-batch-size", 512]
    words = [SCRIPTS["01"], *flags, "-b", 512]
    done = run(words, 200, on_gpus(PYTHONPATH=tmp_path), fails=True, forked=False)
    assert "OutOfMemoryError: CUDA out of memory" in done.stderr.splitlines()[-1]


@needs_kernels
def test_profile_shows_kernels(flags, tmp_path):
    start("01", *flags, *STEPS, "-e", "run", "--profile")
    (path,) = (tmp_path / "run").glob("*.pt.trace.json*")
    with gzip.open(path) if path.suffix == ".gz" else open(path) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


def test_how_fast_gpt_2_trains(tmp_path, corpus, record_property):
    """What one wants to know of a card. (On pretended GPUs a small one, for the arithmetic.)"""
    config = GPT2Config(bos_token_id=1, eos_token_id=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    if not REAL:
        config.update({"n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 384})
    config.save_pretrained(tmp_path / "gpt2")
    ByT5Tokenizer().save_pretrained(tmp_path / "gpt2")
    flags = ["-m", tmp_path / "gpt2", "-d", corpus / "corpus.jsonl", "--save-dir", tmp_path]
    steps = ["--max-steps", 60 if REAL else 2, "--log-freq", 20 if REAL else 1, "-e", "run"]
    for batch in (16, 8, 4, 2, 1) if REAL else (1,):  # the largest that fits
        words = [SCRIPTS["01"], *flags, *steps, "-b", batch, *([] if REAL else EXACT)]
        try:
            run(words, 300, on_gpus(), forked=not REAL)
            break
        except AssertionError as error:
            if "out of memory" not in str(error):
                raise
    rows = list(metrics(tmp_path / "run").values())
    row, memory = rows[-1], max(row["memory_gb"] for row in rows)
    wte, width, layers = config.vocab_size * config.n_embd, config.n_embd, config.n_layer
    operations = 6 * (wte + 12 * layers * width**2) + 12 * layers * width * config.n_positions
    rate = row["tokens_per_s"] * operations
    said = f"GPT-2, rows of 1024, -b {batch}: {row['tokens_per_s']:,.0f} tokens/s, "
    said += f"{rate / 1e12:.3g} TFLOP/s"
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
    name = torch.cuda.get_device_name() if REAL else "pretended GPU"
    for card, peak in peaks.items():  # in bf16, without sparsity, of the SXM versions
        if card in name:
            said += f", {rate / peak:.0%} MFU"
    said += f", at most {memory:.1f} GB of memory"
    print(said)
    record_property("gpu", said)


def what_to_send():
    """Yield the lines that say which GPUs, drivers and versions these tests have run on."""
    names = [torch.cuda.get_device_name(i) for i in range(REAL)] or ["pretended"]
    yield f"GPUs: {len(names)} x {names[0]}"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        yield "driver, memory: " + subprocess.run(query, capture_output=True, text=True).stdout
    import transformers

    yield f"torch {torch.__version__} (CUDA {torch.version.cuda}), Python {sys.version.split()[0]}"
    yield f"transformers {transformers.__version__}, NCCL {REAL and torch.cuda.nccl.version()}"
