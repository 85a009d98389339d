"""What train_llm_sharded.py promises: stage 03's training, in 1/N of the memory on each rank."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from lab.hosts import Hosts, finish, wait_for, why_not
from lab.stages import (
    FOLDERS,
    ROOT,
    SHARDED,
    STEPS,
    be_python,
    environment,
    forkserver,
    metrics,
    same_weights,
    train,
    weights,
    worst_difference,
)
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
)

STAGE_03 = ROOT / FOLDERS["03"] / "train_llm.py"
MOMENTS = ["exp_avg", "exp_avg_sq"]  # of the gradients, in AdamW


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


def train_sharded(folder, processes, *flags):
    """Run it to its end; return what rank 0 has printed."""
    codes, output = Ranks(folder, processes, *flags).end()
    assert codes == [0] * processes, output
    return output


def once_at_work(run_dir, more_steps=1):
    """Wait until the run has logged some steps more than now."""
    path = run_dir / "metrics.jsonl"
    before = len(metrics(run_dir)) if path.exists() else 0
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= before + more_steps)


@pytest.mark.parametrize("processes, batch", [(1, 4), (2, 4), (2, 2), (4, 1)])
def test_same_loss_curve(flags, alone, tmp_path, processes, batch):
    output = train_sharded(tmp_path, processes, *flags, *STEPS, "-b", batch, "-e", "run")
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"{processes} x batch size {batch}: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == processes
    assert ("one rank keeps all of the model" in output) == (processes == 1)
    assert output.count("-" * 40) == 3  # the samples
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    saved = weights(tmp_path / "run")
    assert loaded.keys() == saved.keys() == weights(alone).keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_stops_and_goes_on_along_one_curve_03_sharded_on_2_then_4_then_01(flags, tmp_path):
    flags += ["--max-steps", 40, "--log-freq", 1, "--global-batch-size", 8]
    train("01", *flags, "-e", "alone")
    flags, run_dir, stopped_at = [*flags, "-b", 2, "-e", "run"], tmp_path / "run", [0]
    links = [(STAGE_03, 2, signal.SIGUSR1), (SHARDED, 2, signal.SIGTERM)]
    for script, processes, number in [*links, (SHARDED, 4, signal.SIGUSR1)]:
        run = Ranks(tmp_path, processes, *flags, script=script)
        once_at_work(run_dir, more_steps=3)
        os.kill(run.processes[1].pid, number)  # one rank is told, and all stop at one step
        codes, output = run.end()
        assert codes == [0 if number == signal.SIGUSR1 else 128 + number] * processes, output
        assert f"step {stopped_at[-1]} of 40" in output
        stopped_at.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"])
        assert f"stopped by {number.name} after step {stopped_at[-1]}" in output
        assert stopped_at[-2] < stopped_at[-1] == list(metrics(run_dir))[-1] < 40
        assert "val_loss" not in metrics(run_dir)[stopped_at[-1]]  # no time
    train("01", *flags)
    sizes = [row["world_size"] for row in metrics(run_dir).values() if "world_size" in row]
    assert [sizes.count(size) > 0 for size in (2, 4)] == [True, True]
    difference = worst_difference(
        metrics(tmp_path / "alone"), metrics(run_dir), ["loss", "grad_norm"]
    )
    print(f"moved after steps {stopped_at[1:]}: largest difference {difference:.1e}")
    assert difference < 1e-4


def test_a_killed_rank_ends_all_and_the_run_resumes_bit_for_bit(flags, dropout_model, tmp_path):
    flags += ["-m", dropout_model, "--max-steps", 40, "--ckpt-freq", 7, "--log-freq", 1, "-b", 4]
    train_sharded(tmp_path, 2, *flags, "-e", "whole")
    flags += ["-e", "killed"]
    for killed in (1, 0):
        run = Ranks(tmp_path, 2, *flags)
        once_at_work(tmp_path / "killed", more_steps=9)
        began = time.monotonic()
        run.processes[killed].kill()
        codes, output = run.end(timeout=60)
        print(f"all ended {time.monotonic() - began:.1f} s after rank {killed}")
        assert all(codes), output
    assert "of 40" in output and "step 0 of 40" not in output
    train_sharded(tmp_path, 2, *flags)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "killed")) == 0


def test_untied_llama_on_5_ranks_some_of_which_have_no_part_of_a_norm(flags, tmp_path):
    """12 rows on 5 ranks: 3, 3, 3, 3, 0. There also are 40 rows to validate on, in batches of 3."""
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 12, "intermediate_size": 28, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": 1}
    LlamaConfig(**sizes, tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    flags += ["-m", tmp_path / "llama", "-s", 64, *STEPS, "--max-steps", 32]
    flags += ["--global-batch-size", 15]
    train("01", *flags, "-b", 15, "-e", "alone")
    flags += ["-b", 3, "-e", "run"]
    run = Ranks(tmp_path, 5, *flags)
    once_at_work(tmp_path / "run", more_steps=3)
    os.kill(run.processes[4].pid, signal.SIGUSR1)
    codes, output = run.end()
    assert codes == [0] * 5 and "stopped by SIGUSR1" in output, output
    train_sharded(tmp_path, 5, *flags)
    difference = worst_difference(
        metrics(tmp_path / "alone"), metrics(tmp_path / "run"), ["loss", "grad_norm"]
    )
    print(f"Llama on 5 ranks: largest difference {difference:.1e}")
    assert difference < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def bytes_of(tensors):
    """Return the size of the memory behind tensors, of their local parts where they are parts."""
    storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident(what):
    """Return memory of this process in bytes: VmHWM, the highest since it was last asked for that,
    or RssAnon, what it has now and shares with no file."""
    status = Path("/proc/self/status").read_text()
    if what == "VmHWM":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) * 1024


def weighing(words, env, outputs):
    """Be a rank that writes down its peak until it has its part of the model (or, to go on, of the
    checkpoint), what it holds after a step, and its peak since the step before."""
    found = {}

    def weigh_start(module, args):
        kinds = ("VmHWM", "RssAnon") if not found else ()
        found.update({kind: resident(kind) - base[kind] for kind in kinds})

    def weigh(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        moments = [optimizer.state[p][name] for p in parameters for name in MOMENTS]
        gradients = [parameter.grad for parameter in parameters]
        held = {
            "parameters": bytes_of(parameters),
            "gradients": bytes_of(gradients),
            "moments": bytes_of(moments),
            "peak": resident("VmHWM"),
        }
        outputs[0].with_suffix(".json").write_text(json.dumps(held | found))

    # Give memory back to the system once it is free, so that what a peak counts is in use.
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD
    resident("VmHWM")
    base = {kind: resident(kind) for kind in ("VmHWM", "RssAnon")}
    register_module_forward_pre_hook(weigh_start)
    register_optimizer_step_post_hook(weigh)
    GenerationMixin.generate = lambda self, start, **_: start  # a sample takes longer than the rest
    be_python(words, env, outputs)


def weighed(script, processes, flags, folder):
    """Return what each rank of a run of a few steps holds, in bytes."""
    more = [] if "--max-steps" in flags else ["--max-steps", 3]
    more += ["--global-batch-size", 4, "-b", 1]
    run = Ranks(folder, processes, *flags, *more, script=script, start=weighing)
    codes, output = run.end(300)
    assert codes == [0] * processes, output
    return [json.loads(path.with_suffix(".json").read_text()) for path in run.outputs]


def test_a_rank_holds_its_part_of_parameters_gradients_and_moments(flags, tmp_path):
    whole = weighed(STAGE_03, 2, flags, tmp_path)[0]
    assert whole["moments"] == 2 * whole["parameters"] == 2 * whole["gradients"] > 0
    for processes in (2, 4):
        for held in weighed(SHARDED, processes, flags, tmp_path):
            parts = [held[kind] * processes / whole[kind] for kind in list(whole)[:3]]
            print(f"1/{processes} times {parts}")
            assert all(abs(part - 1) < 0.1 for part in parts)


@pytest.mark.slow
def test_only_rank_0_ever_has_the_whole_model(flags, few_texts, tmp_path):
    """Neither to start nor to go on, where the checkpoint is mapped and not read."""
    ByT5Tokenizer().save_pretrained(tmp_path / "59M")
    sizes = {"n_layer": 12, "n_head": 10, "n_embd": 640, "n_positions": 128}
    GPT2Config(**sizes, vocab_size=384, eos_token_id=1).save_pretrained(tmp_path / "59M")
    flags = [*flags, "-m", tmp_path / "59M", "-d", few_texts, "-e", "run"]
    for kind, steps in {"VmHWM": 2, "RssAnon": 3}.items():
        ranks = weighed(SHARDED, 2, [*flags, "--max-steps", steps], tmp_path)
        models = [rank[kind] / (59.4e6 * 4) for rank in ranks]
        print(f"{kind} before step {steps}: {models} models in fp32")
        # To start, half of the model, and a block. To go on, half of its two moments as well.
        assert models[1] < (0.85 if kind == "VmHWM" else 1.8)


@pytest.mark.slow
def test_peak_memory_of_a_model_of_59_million_parameters(flags, few_texts, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "59M")
    sizes = {"n_layer": 12, "n_head": 10, "n_embd": 640, "n_positions": 128}
    GPT2Config(**sizes, vocab_size=384, eos_token_id=1).save_pretrained(tmp_path / "59M")
    flags, peaks = [*flags, "-m", tmp_path / "59M", "-d", few_texts], {}
    for processes in (1, 2, 4):
        for script in (STAGE_03, SHARDED):
            held = weighed(script, processes, flags, tmp_path)
            peaks[script, processes] = max(rank["peak"] for rank in held) / 2**20
            state = sum(held[0][kind] for kind in list(held[0])[:3]) / 2**20
            peak = peaks[script, processes]
            print(f"{script.name} on {processes}: holds {state:.1f} MiB, peak {peak:.0f} MiB")
    assert peaks[SHARDED, 4] < peaks[SHARDED, 2] < peaks[STAGE_03, 2]
    assert peaks[SHARDED, 4] < 0.6 * peaks[STAGE_03, 4]


def without_blocks(words, env, outputs):
    """Be a rank whose library returns a model that is not a list of blocks."""
    from_config = AutoModelForCausalLM.from_config

    def other(*args, **kwargs):
        model = from_config(*args, **kwargs)
        model.transformer.h = torch.nn.Sequential(*model.transformer.h)
        return model

    AutoModelForCausalLM.from_config = other
    be_python(words, env, outputs)


def test_a_model_without_blocks_is_refused_in_one_line(flags, tmp_path):
    codes, output = Ranks(tmp_path, 1, *flags, start=without_blocks).end()
    assert codes == [1]
    assert output.splitlines()[-1].startswith("error: --model-name: this model has no list of")
    assert "Traceback" not in output


def test_another_model_s_checkpoint_is_refused_in_one_line(flags, dropout_model, alone, tmp_path):
    (tmp_path / "run").symlink_to(alone)
    more = [*STEPS, "-e", "run", "-m", dropout_model]
    codes, output = Ranks(tmp_path, 2, *flags, *more, "-b", 4).end()
    assert codes == [1, 1]
    assert output.splitlines()[-1].startswith("error: --model-name was ")


@pytest.mark.slow
def test_compiled_blocks_keep_to_the_curve(flags, alone, tmp_path):
    train_sharded(tmp_path, 2, *flags, *STEPS, "-b", 4, "-e", "run", "--compile")
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()) and "CI" not in os.environ, reason=str(why_not()))
def test_same_loss_curve_on_two_hosts(flags, alone, tmp_path):
    hosts = Hosts(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(hosts.down)
        hosts("up")
        runs = hosts.both(*flags, *STEPS, "-b", 1, "-e", "run", processes=2, script=SHARDED)
        outputs = finish(*runs)
        assert [run.returncode for run in runs] == [0, 0], outputs
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"2 hosts x 2: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 4
