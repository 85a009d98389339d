"""Time the stages against the ceiling: python tests/benchmark.py [--rounds 5] [--steps 60]

The ceiling is a bare loop: the same model and optimizer on rows already in memory, no data set,
no log, no schedule, no checkpoint. The variants take turns, so that a machine whose speed drifts
slows all of them; what counts is the ratio within a round, and its median.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import transformers
from stages import command, environment, metrics

BARE_LOOP = """
import sys, time, torch
from transformers import AutoModelForCausalLM, GPT2Config
steps, batch = int(sys.argv[1]), int(sys.argv[2])
config = GPT2Config(n_layer=4, n_head=4, n_embd=192, n_positions=128, vocab_size=384,
    resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=True)
forward = torch.compile(model) if device.type == "cuda" else model
rows = torch.randint(0, 256, (64, batch, 128), device=device)
def train(steps):
    for step in range(steps):
        ids = rows[step % 64]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
train(20)
start = time.perf_counter()
train(steps)
print(steps * batch * 128 / (time.perf_counter() - start))
"""


def bare_loop(steps, batch, folder):
    """Return tokens/s of the bare loop, after 20 steps of warm-up."""
    line = [sys.executable, "-c", BARE_LOOP, str(steps), str(batch)]
    return float(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def stage(number, processes, steps, batch, folder):
    """Return tokens/s as the stage logs them, likewise after 20 steps; it logs every 10."""
    flags = ["-e", number, "--save-dir", folder, "--max-steps", 20 + steps]
    flags += ["-b", batch // processes, "--global-batch-size", batch]
    threads = max(1, torch.get_num_threads() // processes)
    subprocess.run(
        command(number, *flags, processes=processes),
        env=environment(OMP_NUM_THREADS=threads, WANDB_MODE=None),
        check=True,
        capture_output=True,
    )
    rows = metrics(Path(folder) / number)
    # Equal numbers of tokens, hence the harmonic mean.
    return statistics.harmonic_mean([r["tokens_per_s"] for s, r in rows.items() if s > 20])


VARIANTS = {
    "bare loop": bare_loop,
    "stage 01": partial(stage, "01", 1),
    "stage 02, 2 processes": partial(stage, "02", 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--global-batch", type=int, default=8)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} "
        f"threads in all, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
    )
    speeds = {name: [] for name in VARIANTS}
    for number in range(args.rounds):
        for name, variant in VARIANTS.items():
            with tempfile.TemporaryDirectory() as folder:
                speeds[name].append(variant(args.steps, args.global_batch, folder))
        line = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
        print(f"round {number + 1}: {line} tokens/s", flush=True)
    for name, other in (("stage 01", "bare loop"), ("stage 02, 2 processes", "stage 01")):
        ratios = [a / b for a, b in zip(speeds[name], speeds[other], strict=True)]
        print(
            f"{name} / {other}: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
