"""What train_llm_sharded.py promises: stage 03's training, in 1/N of the memory on each rank."""

import ctypes
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from lab.hosts import succeed, wait_for, why_not
from lab.ranks import Ranks, once_at_work, train_sharded
from lab.stages import (
    FOLDERS,
    ROOT,
    SHARDED,
    STEPS,
    apply,
    be_python,
    blocks_of,
    environment,
    metrics,
    same_weights,
    train,
    weights,
    worst_difference,
)
from lab.stages import run as python
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


@pytest.mark.parametrize(
    "processes, batch, more", [(1, 4, []), (2, 4, []), (2, 2, []), (4, 1, ["--recompute"])]
)
def test_same_loss_curve(flags, alone, tmp_path, processes, batch, more):
    output = train_sharded(tmp_path, processes, *flags, *STEPS, "-b", batch, "-e", "run", *more)
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
    checkpoint), what it holds after a step, its peak since the step before, and that of the end."""
    found = {}

    def weigh_start(module, args):
        kinds = ("VmHWM", "RssAnon") if not found else ()
        found.update({kind: resident(kind) - base[kind] for kind in kinds})

    def weigh(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        moments = [optimizer.state[p][name] for p in parameters for name in MOMENTS]
        gradients = [parameter.grad for parameter in parameters]
        found["parameters"] = bytes_of(parameters)
        found["gradients"] = bytes_of(gradients)
        found["moments"] = bytes_of(moments)
        found["peak"] = resident("VmHWM")

    # Give memory back to the system once it is free, so that what a peak counts is in use.
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD
    resident("VmHWM")
    base = {kind: resident(kind) for kind in ("VmHWM", "RssAnon")}
    register_module_forward_pre_hook(weigh_start)
    register_optimizer_step_post_hook(weigh)
    GenerationMixin.generate = lambda self, start, **_: start  # a sample takes longer than the rest
    try:
        be_python(words, env, outputs)
    finally:
        found["end"] = resident("VmHWM")  # of the last save
        outputs[0].with_suffix(".json").write_text(json.dumps(found))


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
            kinds = ("parameters", "gradients", "moments")
            parts = [held[kind] * processes / whole[kind] for kind in kinds]
            print(f"1/{processes} times {parts}")
            assert all(abs(part - 1) < 0.1 for part in parts)


@pytest.fixture(scope="module")
def large(few_texts, tmp_path_factory):
    """A model of 59.4 million parameters, and few texts: flags of a run."""
    folder = tmp_path_factory.mktemp("59M")
    ByT5Tokenizer().save_pretrained(folder)
    sizes = {"n_layer": 12, "n_head": 10, "n_embd": 640, "n_positions": 128}
    GPT2Config(**sizes, vocab_size=384, eos_token_id=1).save_pretrained(folder)
    return ["-m", folder, "-d", few_texts, "-s", 64]


def fits():
    """Return the function of sharding.md that says what a model takes."""
    page = (ROOT / FOLDERS["03"] / "sharding.md").read_text()
    names = {}
    exec(re.search(r"```python\n(def fits.*?)\n\n\n", page, re.DOTALL)[1], names)
    return names["fits"]


@pytest.mark.slow
def test_what_fits_is_what_processes_take(flags, large, tmp_path):
    """The formula of sharding.md, less autocast's copies in bf16, which a CPU in fp32 has not."""
    billions, peaks = 59.4e6 / 1e9, {}
    flags = [*flags, *large, "-e", "run"]
    for processes in (2, 4):
        gpu, start, save = fits()(billions, processes)
        state = gpu - 2 * billions
        for kind, steps in {"start": 2, "go on": 3}.items():  # from this run's first checkpoint
            ranks = weighed(SHARDED, processes, [*flags, "--max-steps", steps], tmp_path)
            gb = [{name: value / 1e9 for name, value in rank.items()} for rank in ranks]
            print(f"{processes} ranks, {kind}: {json.dumps(gb)}")
            held = [rank["parameters"] + rank["gradients"] + rank["moments"] for rank in gb]
            assert held == pytest.approx([state] * processes, rel=0.02)
            parts, block = 4 * billions / processes, 4 * billions / 12
            for rank, found in enumerate(gb):
                # To start, the whole on rank 0 only, elsewhere its part and some blocks. To go on,
                # its part of the weights and of two moments: the file is mapped, not read.
                if kind == "start":
                    assert found["VmHWM"] < (start if rank == 0 else parts) + 4 * block
                else:
                    assert found["RssAnon"] < 3 * parts + 0.05
                # In a step, 0.35 GB of Python and its libraries, some blocks, activations.
                assert 0 < found["peak"] - state < 0.35 + 4 * block + 0.25
        peaks[processes] = max(found["peak"] for found in gb)
        # To save, a whole checkpoint on rank 0, beside its parts.
        assert gb[0]["end"] == pytest.approx(0.35 + save + 3 * parts, rel=0.25)
        (tmp_path / "run").rename(tmp_path / f"run-{processes}")
    whole = weighed(STAGE_03, 4, flags[:-2], tmp_path)[0]["peak"] / 1e9
    print(f"DDP on 4: peak {whole:.3f} GB")
    assert peaks[4] < peaks[2] < whole and peaks[4] < 0.6 * whole


@pytest.mark.slow
def test_saving_in_parts_as_the_exercise_does_it(flags, alone, tmp_path):
    """Killed while the parts are being written, moved from 2 ranks to 4, and then to stage 01."""
    page = "03-multi-node/sharding.md"
    (solution,) = [diff for diff in blocks_of(page, "diff") if "async_save" in diff]
    (convert,) = [program for program in blocks_of(page, "python") if "dcp_to_torch" in program]
    script = tmp_path / "parts.py"
    script.write_text(apply(solution, SHARDED.read_text()))
    flags += [*STEPS, "--ckpt-freq", 4, "-e", "run"]
    run_dir = tmp_path / "run"
    run = Ranks(tmp_path, 2, *flags, "-b", 4, script=script)
    wait_for(lambda: (run_dir / "parts-8").exists())
    run.processes[1].kill()
    assert all(run.end(60)[0])
    pointer = torch.load(run_dir / "pointer.pt")
    assert pointer["step"] == 4 and (run_dir / "parts-4" / ".metadata").exists()

    run = Ranks(tmp_path, 4, *flags, "-b", 2, script=script)
    once_at_work(run_dir, more_steps=5)
    os.kill(run.processes[3].pid, signal.SIGUSR1)
    codes, output = run.end()
    assert codes == [0] * 4 and "step 4 of 16" in output, output
    stopped = torch.load(run_dir / "pointer.pt")["step"]
    assert 8 < stopped < 16
    assert [path.name for path in run_dir.glob("parts-*")] == [f"parts-{stopped}"]

    (tmp_path / "convert.py").write_text(convert)
    python(["convert.py", run_dir], 60, environment(), tmp_path)
    went_on = train("01", *flags, "-b", 8)
    assert f"step {stopped} of 16" in went_on.stderr
    assert worst_difference(metrics(alone), metrics(run_dir)) < 1e-4


@pytest.mark.slow
def test_the_groups_of_a_mesh_know_the_timeout(tmp_path):
    """As sharding.md makes the mesh of hybrid sharding: a group of it does not wait for minutes."""
    programs = blocks_of("03-multi-node/sharding.md", "python")
    (mesh,) = [program for program in programs if "init_device_mesh" in program]
    mesh = mesh[: mesh.index("fully_shard")].replace('int(os.environ["LOCAL_WORLD_SIZE"])', "1")
    (tmp_path / "mesh.py").write_text(f"""
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
timeout, on_gpu, device = timedelta(seconds=3), False, torch.device("cpu")
dist.init_process_group("gloo", timeout=timeout)
world_size = dist.get_world_size()
{mesh}
if dist.get_rank() == 0:
    began = time.monotonic()
    try:
        dist.all_reduce(torch.zeros(1), group=mesh.get_group("replicate"))
    except RuntimeError:
        print("waited", time.monotonic() - began, flush=True)
time.sleep(0 if dist.get_rank() == 0 else 6)
""")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "mesh.py"]
    printed = python(words, 60, environment(), tmp_path).stdout
    assert 2 < float(re.search(r"waited (\S+)", printed)[1]) < 5


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


def counting(words, env, outputs):
    """Be a rank that writes down how many graphs have been compiled."""
    be_python(words, env, outputs)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    outputs[0].with_suffix(".graphs").write_text(str(graphs))


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_keep_to_the_curve(flags, alone, tmp_path):
    flags += [*STEPS, "-b", 4, "-e", "run", "--compile", "--recompute"]
    run = Ranks(tmp_path, 2, *flags, start=counting)
    codes, output = run.end()
    assert codes == [0, 0], output
    assert all(int(path.with_suffix(".graphs").read_text()) > 0 for path in run.outputs)
    assert worst_difference(metrics(alone), metrics(tmp_path / "run")) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()) and "CI" not in os.environ, reason=str(why_not()))
def test_same_loss_curve_on_two_hosts(hosts, flags, alone, tmp_path):
    flags += [*STEPS, "-b", 1, "-e", "run"]
    succeed(*hosts.both(*flags, processes=2, script=SHARDED))
    difference = worst_difference(metrics(alone), metrics(tmp_path / "run"))
    print(f"2 hosts x 2: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert metrics(tmp_path / "run")[16]["world_size"] == 4
