"""Measure what the READMEs say about speed: python tests/pages/benchmark.py [SECTION ...]

Each section prints its table and replaces its part of results.json, which pictures.py draws from.
What is compared takes turns, so that a machine whose speed drifts slows all of it: trainings run
for a second each, while the others are stopped by SIGSTOP. What counts is the ratio within a round,
and the median over the rounds. Let nothing else run meanwhile.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.hosts import Hosts, finish, why_not
from lab.material import make_model, source_code
from lab.stages import (
    FOLDERS,
    ROOT,
    command,
    environment,
    metrics,
    processes_with,
    weights,
    worst_difference,
)
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
)

RESULTS = ROOT / "tests" / "pages" / "results.json"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ON_GPU = torch.cuda.is_available()
GLOBAL_BATCH, SEQ_LENGTH = 8, 128  # the built-in defaults
# Operations/s in bf16, without sparsity, by the data sheets of the SXM versions.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}

BARE_LOOP = """
import itertools, json, sys, torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
AttentionInterface.register("causal", sdpa_attention_forward)
log, batch = open(sys.argv[1], "a"), int(sys.argv[2])
config = LlamaConfig(hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, vocab_size=384, tie_word_embeddings=True)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
model.set_attn_implementation("causal")
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=True)
forward = torch.compile(model) if device.type == "cuda" else model
rows = torch.randint(0, 256, (64, batch, 128), device=device)
for step in itertools.count(1):
    ids = rows[step % 64]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(json.dumps({"step": step, "loss": loss.item()}), file=log, flush=True)
"""

# Runs a stage and prints how long it trained, evaluated and saved.
STOPWATCH = """
import time
import train_llm
spent = {}
def timed(name):
    work = getattr(train_llm, name)
    def timed_work(*args):
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            spent[name] = spent.get(name, 0) + time.perf_counter() - start
    setattr(train_llm, name, timed_work)
for name in ("evaluate", "save_checkpoint"):
    timed(name)
class Bar(train_llm.tqdm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        spent["from"] = time.perf_counter()
    def close(self):
        super().close()
        spent.setdefault("to", time.perf_counter())
train_llm.tqdm = Bar
train_llm.print_sample = lambda *args: None
train_llm.main(train_llm.parse_args())
print(spent["evaluate"], spent["save_checkpoint"], spent["to"] - spent["from"])
"""

# Peak memory of a few steps against what can be calculated.
MEMORY = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
on_gpu = torch.cuda.is_available()
config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
    num_attention_heads=8, vocab_size=384, tie_word_embeddings=True)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
ids = torch.randint(0, 256, (int(sys.argv[1]), 128))
if on_gpu:
    model, ids = model.cuda(), ids.cuda()
parameters = sum(p.numel() for p in model.parameters()) * 4
kept = {}
def keep(tensor):
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor
with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
own = {p.untyped_storage().data_ptr() for p in model.parameters()}
activations = sum(size for pointer, size in kept.items() if pointer not in own)
del loss
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
def peak():
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = torch.cuda.memory_allocated() - parameters if on_gpu else None
if before is None:
    import gc; gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    before = pages * resource.getpagesize() - parameters
for _ in range(3):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(parameters, activations, peak() - before)
"""


# A large matrix product, in the type that autocast would use: its operations/s.
MATMUL = """
import statistics, time, torch
on_gpu = torch.cuda.is_available()
bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
size, device = 8192 if on_gpu else 4096, "cuda" if on_gpu else "cpu"
matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
seconds = []
for _ in range(10):
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()  # waits for the GPU
    seconds.append(time.perf_counter() - start)
print(2 * size**3 / statistics.median(seconds))
"""


def real_environment(**extra):
    """Return the environment of a reader: with wandb, GPUs and Python's own garbage collection."""
    as_is = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PYTHONPATH")}
    return environment(**{"WANDB_MODE": "offline"} | as_is | extra)


def finished(line, env, folder=None):
    """Run a command to its end; return its output, or raise with the end of what it said."""
    done = subprocess.run([*map(str, line)], env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{line} failed: {done.stderr[-2000:]}")
    return done.stdout


def python(code, *arguments, folder=None, **env):
    """Run code in a new process; return the numbers that it prints in its last line."""
    env = real_environment(OMP_NUM_THREADS=CORES, **env)
    output = finished([sys.executable, "-c", code, *arguments], env, folder)
    return [float(word) for word in output.splitlines()[-1].split()]


def train(stage, *flags, processes=1, batch=GLOBAL_BATCH, hosts=None):
    """Run a stage with all cores shared out among its processes; return its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        more = ["-e", "run", "--save-dir", folder, "-b", batch // processes]
        more += ["--global-batch-size", batch, *flags]
        env = {"OMP_NUM_THREADS": max(1, CORES // processes)}
        if hosts:
            for output in finish(*hosts.both(*more, **env), timeout=1200):
                assert "Error" not in output, output
        else:
            finished(command(stage, *more, processes=processes), real_environment(**env))
        return metrics(folder / "run")


class Training:
    """A training that is stopped most of the time."""

    def __init__(self, folder, stage, *flags, processes=1, batch=GLOBAL_BATCH, steps=20):
        """Start a stage, or the bare loop (stage None); stop it after some steps."""
        self.folder, self.batch = folder, batch
        self.log = folder / "run" / "metrics.jsonl"
        self.log.parent.mkdir(parents=True)
        line = [sys.executable, "-c", BARE_LOOP, self.log, batch]
        if stage:
            more = ["-e", "run", "--save-dir", folder, "-b", batch // processes]
            more += ["--global-batch-size", batch, "--max-steps", 1_000_000]
            more += ["--ckpt-freq", 1_000_000]  # what saving and evaluating cost is another section
            line = command(stage, *more, *flags, processes=processes)
        env = real_environment(OMP_NUM_THREADS=max(1, CORES // processes), BENCHMARK=folder)
        with open(folder / "output", "w") as output:
            quiet = {"stdout": output, "stderr": output}
            self.process = subprocess.Popen([*map(str, line)], env=env, **quiet)
        while self.last_step()[0] < steps:
            assert self.process.poll() is None, (folder / "output").read_text()
            time.sleep(0.1)
        self.signal(signal.SIGSTOP)
        self.measured_from = self.last_step()
        self.awake = [(self.measured_from[1], time.time())]

    def signal(self, number):
        for pid in processes_with(f"BENCHMARK={self.folder}"):
            with suppress(OSError):  # it has just ended
                agent = b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
                if not agent or number == signal.SIGKILL:  # an agent must go on with its heartbeat
                    os.kill(pid, number)

    def last_step(self):
        """Return the last step that was logged, and when."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        lines = [line for line in lines if line.endswith("}")]
        return (json.loads(lines[-1])["step"], self.log.stat().st_mtime) if lines else (0, 0)

    def run(self, seconds):
        start = time.time()
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        self.signal(signal.SIGSTOP)
        self.awake.append((start, time.time()))

    def end(self):
        self.signal(signal.SIGKILL)
        self.process.wait()

    def speed(self):
        """Return tokens/s since the last call, in the time that it was awake."""
        (first, begin), (last, end) = self.measured_from, self.last_step()
        assert last > first, (self.folder / "output").read_text()
        self.measured_from = last, end
        seconds = sum(max(0, min(b, end) - max(a, begin)) for a, b in self.awake)
        return (last - first) * self.batch * SEQ_LENGTH / seconds


def in_slices(variants, rounds, rotations=12):
    """Run trainings, {name: arguments of Training}, a second each in turn, 12 times in a round.

    Return {name: [tokens/s in a round]}.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        try:
            for number, (name, (words, options)) in enumerate(variants.items()):
                runs[name] = Training(Path(folder, str(number)), *words, **options)
            values = {name: [] for name in runs}
            for number in range(rounds):
                for _ in range(rotations):
                    for run in runs.values():
                        run.run(1)
                for name, run in runs.items():
                    values[name].append(run.speed())
                line = ", ".join(f"{name} {got[-1]:,.0f}" for name, got in values.items())
                print(f"round {number + 1}: {line}", flush=True)
        finally:
            for run in runs.values():
                run.end()
    return values


def in_turn(variants, rounds):
    """Call each variant once a round; return {name: [what it returned]}."""
    values = {name: [] for name in variants}
    for number in range(rounds):
        for name, variant in variants.items():
            values[name].append(variant())
        line = ", ".join(f"{name} {got[-1]:,.4g}" for name, got in values.items())
        print(f"round {number + 1}: {line}", flush=True)
    return values


def ratios(values, to, unit):
    """Print and return for each name its median, and its ratio to another in the same round."""
    table = {}
    for name, got in values.items():
        by_round = [a / b for a, b in zip(got, values[to], strict=True)]
        ratio = [statistics.median(by_round), min(by_round), max(by_round)]
        table[name] = {"median": statistics.median(got), "ratio": ratio}
        print(
            f"{name:<34} {table[name]['median']:>10,.4g} {unit}   of {to}: "
            f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
        )
    return {"unit": unit, "to": to, "table": table}


def curves(rounds):
    """The loss curves of the four stages, 200 steps with one seed and global batch."""
    runs, flags = {}, ["--max-steps", 200]
    runs["stage 01, 1 process"] = train("01", *flags)
    runs["stage 02, 2 processes"] = train("02", *flags, processes=2)
    if not why_not():
        with tempfile.TemporaryDirectory() as folder:
            hosts = Hosts(Path(folder))
            hosts("up")
            try:
                runs["stage 03, 2 hosts"] = train("03", *flags, processes=2, hosts=hosts)
            finally:
                hosts.down()
    runs["stage 04, 2 processes"] = train("04", *flags, processes=2)
    first = runs["stage 01, 1 process"]
    for name, rows in runs.items():
        worst = {k: worst_difference(first, rows, [k]) for k in ("loss", "val_loss", "grad_norm")}
        print(f"{name:<22}", "  ".join(f"{key} differs by {d:.1e}" for key, d in worst.items()))
    print("step  " + "  ".join(runs))
    for step in (10, 50, 100, 200):
        print(f"{step:>4}  " + "  ".join(f"{r[step]['loss']:<21.6f}" for r in runs.values()))
    keys = ("loss", "tokens_per_s")
    return {
        "steps": list(first),
        "runs": {n: {k: [r[k] for r in rows.values()] for k in keys} for n, rows in runs.items()},
    }


def ceiling(rounds):
    """Each stage in one process against a bare loop on rows that are in memory already."""
    variants = {"bare loop": ((None,), {})} | {f"stage {s}": ((s,), {}) for s in FOLDERS}
    return ratios(in_slices(variants, rounds), "bare loop", "tokens/s")


def scaling(rounds):
    """2, 4, ... processes that share out the cores, against one process with all of them."""
    tables = {}
    for batch in (8, 32):
        variants = {"stage 01": (("01",), {"batch": batch})}
        for s in ("02", "03", "04"):
            for count in (2, 4, 8):
                if count <= max(2, CORES):
                    options = {"batch": batch, "processes": count}
                    variants[f"stage {s}, {count} processes"] = ((s,), options)
        print(f"global batch {batch}")
        values = in_slices(variants, rounds, rotations=8 if batch == 8 else 16)
        tables[f"global batch {batch}"] = ratios(values, "stage 01", "tokens/s")
    return tables


def options(rounds):
    """What the defaults on a CPU rest on: threads against processes, compiled or not, bf16."""
    variants = {"1 process": (("01",), {}), "2 processes": (("02",), {"processes": 2})}
    variants["1 process, compiled"] = ("01", "--compile"), {}
    bf16 = ("01", "--dtype", "bf16")
    line = command(*bf16, "--max-steps", 1)
    if subprocess.run(line, env=real_environment(), capture_output=True).returncode == 0:
        variants["1 process, bf16"] = bf16, {}
    else:
        print("bf16 fails here")
    return ratios(in_slices(variants, rounds), "1 process", "tokens/s")


def rows(rounds):
    """Tokens per second that become rows of a BPE tokenizer's tokens, by --num-proc."""
    sys.path.insert(0, str(ROOT / FOLDERS["01"]))
    import train_llm
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [text for text in train_llm.load_documents(None, None)["text"] if text]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=16384, special_tokens=["<end>"]))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
        tokenizer.save_pretrained(folder)
        sizes = {"n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 2048}
        GPT2Config(**sizes, vocab_size=len(tokenizer)).save_pretrained(folder)
        path = Path(folder, "texts.jsonl")
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts * 5))
        print(f"{len(texts) * 5} documents, {path.stat().st_size / 1e6:.0f} MB")
        lengths = iter(range(1024, 2048))

        def prepare(length, *more):
            """Return the seconds that a process takes, and the tokens in its rows."""
            flags = ["-m", folder, "-d", path, "-s", length, "--prepare-only", *more]
            start = time.perf_counter()
            said = finished(command("01", *flags), real_environment(OMP_NUM_THREADS=CORES))
            seconds = time.perf_counter() - start
            return seconds, int(re.search(r"(\d+) rows", said)[1]) * length

        def make(*more):
            length = next(lengths)  # another one: new rows
            cold, tokens = prepare(length, *more)
            return tokens / (cold - prepare(length)[0])

        variants = {f"--num-proc {n}": partial(make, "--num-proc", n) for n in range(1, CORES + 1)}
        prepare(next(lengths))  # the texts are in the cache now
        return ratios(in_turn({"one process": make} | variants, rounds), "one process", "tokens/s")


def first_step(*flags, **env):
    """Return the seconds from the command to the first logged step."""
    line = command("01", "--log-freq", 1, *flags)
    env = real_environment(OMP_NUM_THREADS=CORES, **env)
    start = time.perf_counter()
    run = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        for text in run.stderr:
            if b" loss " in text:
                return time.perf_counter() - start
    finally:
        run.kill()
        run.communicate()
    raise AssertionError(f"no step: {line}")


def start(rounds):
    """Seconds from the command to the first step: cold and warm cache, and after 100,000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = ["--save-dir", folder]
        finished(command("01", *flags, "-e", "old", "--max-steps", 1), real_environment())
        flags += ["--max-steps", 110_000]
        path = folder / "old" / "checkpoint.pt"
        checkpoint = torch.load(path)
        (row,) = metrics(folder / "old").values()
        checkpoint["step"] = checkpoint["scheduler"]["last_epoch"] = 100_000
        del row["val_loss"]
        rows = [json.dumps(row | {"step": step}) for step in range(10, 100_001, 10)]
        text = "".join(line + "\n" for line in rows)
        (folder / "old" / "metrics.jsonl").write_text(text)
        checkpoint["metrics_size"] = len(text)
        torch.save(checkpoint, path)

        numbers = iter(range(1000))
        variants = {
            "warm": lambda: first_step(*flags, "-e", f"new{next(numbers)}"),
            "cold": lambda: first_step(
                *flags, "-e", f"new{next(numbers)}", HF_HOME=folder / f"cold{next(numbers)}"
            ),
            "after 100,000 steps": lambda: first_step(*flags, "-e", "old"),
        }
        return ratios(in_turn(variants, rounds), "warm", "s")


def saving(rounds):
    """The part of the training time that evaluations and checkpoints take, every 100 steps."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--save-dir", folder, "--max-steps", 300, "-e"]
        runs = [
            python(STOPWATCH, *flags, number, folder=ROOT / FOLDERS["01"])
            for number in range(rounds)
        ]
        checkpoint = torch.load(Path(folder) / "0" / "checkpoint.pt")
    sizes = {key: bytes_of(value, set()) for key, value in checkpoint.items()}
    found = {
        "evaluation": statistics.median(a / total for a, b, total in runs),
        "checkpoint": statistics.median(b / total for a, b, total in runs),
        "seconds per checkpoint": statistics.median(b / 3 for a, b, total in runs),
    }
    for name, value in found.items():
        print(f"{name:<24} {value:.4f}")
    return {"table": found, "bytes": sizes}


def bytes_of(value, seen):
    """Return how large a part of a checkpoint is; tied weights count once."""
    if isinstance(value, dict):
        return sum(bytes_of(part, seen) for part in value.values())
    if isinstance(value, list):
        return sum(bytes_of(part, seen) for part in value)
    if not isinstance(value, torch.Tensor):
        return len(str(value))
    new = value.data_ptr() not in seen
    seen.add(value.data_ptr())
    return value.nbytes if new else 0


def memory(rounds):
    """Peak memory of a step against what can be calculated."""
    table = {}
    for batch in (8, 32):
        parameters, activations, peak = python(MEMORY, batch)
        expected = 4 * parameters + activations
        print(
            f"batch {batch}: weights, gradients and AdamW's two averages 4 x "
            f"{parameters / 1e6:.1f} MB + activations {activations / 1e6:.1f} MB = "
            f"{expected / 1e6:.1f} MB; measured {peak / 1e6:.1f} MB ({peak / expected:.2f})"
        )
        table[f"batch {batch}"] = {
            "weights": parameters,
            "activations": activations,
            "measured": peak,
        }
    return {"table": table}


def links(rounds):
    """Stage 03 on two hosts over slower and slower links, against bytes / bandwidth.

    A ring all-reduce over n ranks sends 2 (n - 1) / n times the gradients' bytes from each: with
    two ranks, once.
    """
    if why_not():
        print(f"left out: {why_not()}")
        return None
    limits = {"no limit": 0, "1gbit": 1e9, "100mbit": 100e6, "10mbit": 10e6}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        hosts = Hosts(folder)
        hosts("up")
        try:
            for batch in (8, 64):
                for name, bits in limits.items():
                    if bits:
                        hosts("limit", name)
                    flags = ["-e", f"{name}-{batch}", "--save-dir", folder, "-b", 4, "--log-freq"]
                    flags += [1, "--global-batch-size", batch, "--max-steps", 12]
                    finish(*hosts.both(*flags, OMP_NUM_THREADS=1), timeout=900)
                    rows = metrics(folder / f"{name}-{batch}").items()
                    seconds = statistics.median(
                        batch * SEQ_LENGTH / row["tokens_per_s"] for step, row in rows if step > 3
                    )
                    if not bits:
                        free = seconds
                        tensors = weights(folder / f"{name}-{batch}")
                        tied = {tensor.data_ptr(): tensor for tensor in tensors.values()}
                        sent = sum(t.numel() * 4 for t in tied.values())
                    expected = free + (sent * 8 / bits if bits else 0)
                    print(
                        f"{name:<9} global batch {batch:>2}: {seconds:.3f} s a step, expected "
                        f"{expected:.3f} ({seconds / expected - 1:+.0%}), {free / seconds:.0%} of "
                        "the speed without a limit",
                        flush=True,
                    )
                    row = {"link": name, "bits": bits, "batch": batch, "seconds": seconds}
                    table.append(row | {"expected": expected})
                hosts("limit", "off")
        finally:
            hosts.down()
    return {"bytes": sent, "table": table}


def timeline(rounds):
    """One step of two ranks, from the traces of --profile: who computes, who sends, who waits."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_model(folder / "model", dropout=0.0, width=1024)
        text = folder / "corpus.jsonl"
        text.write_text("\n".join(json.dumps({"text": t}) for t in source_code(100)))
        flags = ["-m", model, "-d", text, "-e", "run", "--save-dir", folder, "-b", 16]
        flags += ["--max-steps", 12, "--log-freq", 100, "--ckpt-freq", 100, "--profile"]
        finished(command("02", *flags, processes=2), real_environment())
        ranks = [spans(next((folder / "run").glob(f"rank{rank}.*.json"))) for rank in range(2)]
    begin = min(span["from"] for rank in ranks for span in rank)
    for number, rank in enumerate(ranks):
        for span in rank:
            span["from"], span["to"] = span["from"] - begin, span["to"] - begin
            where = f"{span['from'] / 1e3:>8.1f} to {span['to'] / 1e3:>8.1f} ms"
            print(f"rank {number}  {span['name']:<11} {where}")
    return {"ranks": ranks}


def gpt2(rounds):
    """GPT-2 (124 million weights), 1024 tokens a row: tokens/s, and what part of the peak that is.

    A token costs 6 operations for each weight (2 forward, 4 backward; position embeddings are only
    looked up) and 12 x layers x width x row length for attention, of which causality saves half,
    not counted by custom (Chowdhery et al. 2022, PaLM, appendix B). Operations/s over the peak is
    the MFU (model FLOPs utilization).
    """
    # Without dropout, as in the loops that one compares with; on CPUs it makes attention slow.
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**no_dropout, bos_token_id=1, eos_token_id=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    length = config.n_positions
    operations = 6 * weights + 12 * config.n_layer * config.n_embd * length
    (peak,) = python(MATMUL)
    source = "measured in a large matrix product"
    name = torch.cuda.get_device_name() if ON_GPU else ""
    for gpu, sheet in PEAKS.items():
        if re.search(rf"\b{gpu}\b", name) and not re.search("PCIe|NVL|MIG", name):
            peak, source = sheet, "by the data sheet, bf16"
    print(
        f"{operations / 1e6:,.0f} million operations a token; peak {peak / 1e12:,.2f} TFLOP/s, "
        f"{source}"
    )

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config.save_pretrained(folder / "gpt2")
        ByT5Tokenizer().save_pretrained(folder / "gpt2")
        flags, steps = ["-m", folder / "gpt2"], 60
        if not ON_GPU:  # some rows are enough for a few steps
            text = folder / "corpus.jsonl"
            text.write_text("\n".join(json.dumps({"text": t}) for t in source_code(100)))
            flags, steps = [*flags, "-d", text, "--log-freq", 1], 4

        numbers = iter(range(1000))

        def speed(stage, *more, processes=1):
            at, options = folder / str(next(numbers)), {"processes": processes, "steps": steps}
            try:
                run = Training(at, stage, *flags, *more, batch=batch * processes, **options)
            except AssertionError as error:
                if not re.search("out of (GPU )?memory", str(error)):
                    raise
                return 0
            run.end()
            rows = metrics(at / "run").values()
            return statistics.median([row["tokens_per_s"] for row in rows][1:])

        batch, speeds = 1, {}
        for batch in (4, 8, 16, 32, 64) if ON_GPU else ():
            speeds[batch] = speed("01")
            print(f"batch size {batch}: {speeds[batch]:,.0f} tokens/s", flush=True)
        batch = max(speeds, key=speeds.get, default=1)
        if speeds and not speeds[batch]:
            sys.exit("error: gpt2: this GPU's memory is too small")

        other = "--no-compile" if ON_GPU else "--compile"
        variants = {
            "stage 01": lambda: speed("01"),
            f"stage 01 {other}": lambda: speed("01", other),
            "stage 02, 1 process": lambda: speed("02"),
        }
        for n in (2, 4, 8):
            if n <= torch.cuda.device_count():
                variants[f"stage 02, {n} GPUs, each"] = lambda n=n: speed("02", processes=n) / n
        values = in_turn(variants, rounds)
        values = {name: got for name, got in values.items() if all(got)}  # what did fit
        found = ratios(values, "stage 01", "tokens/s")
        for name, row in found["table"].items():
            row["mfu"] = row["median"] * operations / peak
            print(f"{name:<34} {row['mfu']:>6.1%} MFU")

        # What a checkpoint and an evaluation cost.
        more = ["-b", batch, "-e", "run", "--save-dir", folder, "--max-steps", 2]
        stops = python(STOPWATCH, *flags, *more, folder=ROOT / FOLDERS["01"])
        size = (folder / "run" / "checkpoint.pt").stat().st_size
        print(f"evaluation {stops[0]:.2f} s, checkpoint of {size / 1e9:.2f} GB {stops[1]:.2f} s")
    found |= {"operations per token": operations, "peak": peak, "peak is": source}
    found |= {"batch": batch, "by batch": speeds, "checkpoint bytes": size}
    return found | {"seconds per evaluation": stops[0], "seconds per checkpoint": stops[1]}


def spans(path):
    """Return what happens in the fourth of the profiled steps: [{name, from, to}], in us."""
    trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    step = sorted((e["ts"], e["dur"]) for e in events if e["name"].startswith("ProfilerStep"))[3]
    names = {
        r"enumerate\(DataLoader\)": "data",
        r"DistributedDataParallel.forward": "forward",
        r"(autograd::engine::evaluate_function|gloo:all_reduce|nccl:all_reduce)": None,
        r"Optimizer.step": "optimizer",
    }
    found, backward = [], []
    for event in sorted(events, key=lambda event: event["ts"]):
        if not step[0] <= event["ts"] < sum(step):
            continue
        for pattern, name in names.items():
            if re.match(pattern, event["name"]):
                span = {"from": event["ts"], "to": event["ts"] + event["dur"]}
                if "all_reduce" in event["name"]:
                    found.append({"name": "all-reduce", **span})
                elif name:
                    found.append({"name": name, **span})
                else:
                    backward.append(span)
    ends = {"from": backward[0]["from"], "to": max(span["to"] for span in backward)}
    return [*found, {"name": "backward", **ends}]


SECTIONS = [
    curves,
    ceiling,
    scaling,
    options,
    rows,
    start,
    saving,
    memory,
    links,
    timeline,
    gpt2,
]
ONCE = ["curves", "memory", "links", "timeline"]  # sections in which no round is needed
ON_CPU = ["curves", "scaling", "options", "links", "timeline"]  # sections with more than one rank


def where(section):
    """Return hardware, versions and commit."""
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = named[1] if named else platform.machine()
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "*.py"])
    commit, changed = (
        subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout
        for words in commands
    )
    commit = commit.strip() + ("-dirty" if changed.strip() else "")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = {"cores": CORES, "cpu": cpu}
    if ON_GPU and section not in ON_CPU:
        device |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return device | versions | {"python": platform.python_version(), "commit": commit}


def main():
    known = {section.__name__: section for section in SECTIONS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if not Path("/proc/cpuinfo").exists():
        sys.exit("error: this needs Linux: it finds the processes that it measures in /proc")
    for name in args.sections:
        if name not in known:
            parser.error(f"{name}: no such section; there are {', '.join(known)}")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_HOME"] = cache  # before datasets is imported
        for name in args.sections or known:
            print(f"\n{name}: {known[name].__doc__.splitlines()[0]}", flush=True)
            if name in ON_CPU:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
            elif gpus is None:
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus
            line = f"python tests/pages/benchmark.py {name}"
            line += "" if name in ONCE else f" --rounds {args.rounds}"
            if (found := known[name](args.rounds)) is None:
                continue
            found = {"command": line, "where": where(name)} | found
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[name] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
