"""What train_llm_2d.py promises: the training of all stages, with layers that ranks share."""

import hashlib
import os
import signal

import pytest
import torch
from lab.hosts import succeed, why_not
from lab.material import make_of_kind
from lab.ranks import Ranks, once_at_work, train_sharded
from lab.stages import (
    SHARDED,
    STEPS,
    TWO_D,
    be_python,
    command,
    fork,
    metrics,
    replaced,
    same_weights,
    train,
    weights,
    worst_difference,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM

DROPOUT = {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Small Llamas, and their flags: embedding and head tied or not, heads grouped or not; and a
    model with dropout of what all ranks compute."""
    folder = tmp_path_factory.mktemp("llamas")
    return {
        "tied": make_of_kind(folder / "tied", "llama", tie_word_embeddings=True),
        "grouped": make_of_kind(folder / "grouped", "llama", num_key_value_heads=2),
        "dropout": make_of_kind(folder / "dropout", "starcoder2", num_key_value_heads=2, **DROPOUT),
    }


@pytest.fixture(scope="module")
def curves(kinds, corpus, tmp_path_factory):
    """Return the function that gives stage 01's run of a kind."""
    folder, runs = tmp_path_factory.mktemp("alone"), {}

    def curve(kind):
        if kind not in runs:
            flags = [*kinds[kind], "-d", corpus / "corpus.jsonl", "--save-dir", folder, *STEPS]
            train("01", *flags, "-b", 8, "-e", kind)
            runs[kind] = metrics(folder / kind)
        return runs[kind]

    return curve


def assert_same(expected, run_dir, what):
    difference = worst_difference(expected, metrics(run_dir))
    print(f"{what}: largest difference {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize(
    "kind, processes, size, more",
    [
        ("tied", 2, 2, ["--recompute"]),
        ("tied", 4, None, []),  # 2, unless the ranks are odd
        ("tied", 4, 4, []),
        ("grouped", 4, 2, []),
        ("grouped", 2, 1, []),
    ],
)
def test_same_loss_curve(flags, kinds, curves, tmp_path, kind, processes, size, more):
    flags += [*kinds[kind], *STEPS, "-b", 2, "-e", "run", *more]
    flags += ["--tensor-parallel", size] if size else []
    output = train_sharded(tmp_path, processes, *flags, script=TWO_D)
    size = size or 2
    assert f"-size 2 x {processes // size} groups of {size} ranks" in output
    assert "Warning" not in output and "suboptimal" not in output
    assert_same(curves(kind), tmp_path / "run", f"{kind}, {processes // size} x {size}")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    saved = weights(tmp_path / "run")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.slow
def test_compile_is_left_out_where_gradients_would_be_wrong(flags, tmp_path):
    """Torch 2.13 compiles a split layer to one whose grad_norm is a tenth off, the loss right."""
    qwen3 = make_of_kind(tmp_path / "model", "qwen3", num_key_value_heads=2)
    flags += [*qwen3, *STEPS, "--max-steps", 4]
    train("01", *flags, "-b", 8, "-e", "alone")
    more = ["-b", 2, "-e", "run", "--compile", "--recompute"]
    train_sharded(tmp_path, 2, *flags, *more, script=TWO_D)
    assert_same(metrics(tmp_path / "alone"), tmp_path / "run", "--compile")


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()) and "CI" not in os.environ, reason=str(why_not()))
def test_same_loss_curve_on_two_hosts(hosts, flags, kinds, curves, tmp_path):
    flags += [*kinds["tied"], *STEPS, "-b", 2, "-e", "run"]
    succeed(*hosts.both(*flags, processes=2, script=TWO_D))
    assert_same(curves("tied"), tmp_path / "run", "two hosts x 2")


def hashing(words, env, outputs):
    """Be a rank that writes down a hash of the parameters that all ranks of a group hold."""

    def note(optimizer, args, kwargs):
        digest = hashlib.sha256()
        for parameter in optimizer.param_groups[0]["params"]:
            names = parameter.device_mesh.mesh_dim_names
            if "tensor" not in names or parameter.placements[names.index("tensor")].is_replicate():
                digest.update(parameter.to_local().detach().numpy().tobytes())
        outputs[0].with_suffix(".hash").write_text(digest.hexdigest())

    register_optimizer_step_post_hook(note)
    be_python(words, env, outputs)


def hashes(run):
    return [path.with_suffix(".hash").read_text() for path in run.outputs]


def test_a_killed_run_resumes_bit_for_bit_with_dropout(flags, kinds, tmp_path):
    """And in a group all drop the same of what they all compute, so its ranks stay equal."""
    flags += [*kinds["dropout"], *STEPS, "--ckpt-freq", 4, "-b", 2]
    whole = Ranks(tmp_path, 4, *flags, "-e", "whole", script=TWO_D, start=hashing)
    codes, output = whole.end()
    assert codes == [0] * 4, output
    first, second, third, fourth = hashes(whole)
    assert first == second and third == fourth and first != third
    run = Ranks(tmp_path, 4, *flags, "-e", "killed", script=TWO_D)
    once_at_work(tmp_path / "killed", more_steps=6)
    run.processes[2].kill()
    assert all(run.end(60)[0])
    output = train_sharded(tmp_path, 4, *flags, "-e", "killed", script=TWO_D)
    assert "of 16" in output and "step 0 of 16" not in output
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert worst_difference(metrics(tmp_path / "whole"), metrics(tmp_path / "killed")) == 0


@pytest.mark.slow
def test_goes_on_along_one_curve_2_x_2_then_1_x_4_then_sharded_then_01_then_2_x_2(
    flags, kinds, curves, tmp_path
):
    flags += [*kinds["tied"], *STEPS, "-e", "run", "--ckpt-freq", 1]
    for script, processes, more in [
        (TWO_D, 4, ["--tensor-parallel", 2]),
        (TWO_D, 4, ["--tensor-parallel", 4]),
        (SHARDED, 2, ["-b", 4]),
    ]:
        run = Ranks(tmp_path, processes, *flags, "-b", 2, *more, script=script)
        once_at_work(tmp_path / "run", more_steps=2)
        os.kill(run.processes[-1].pid, signal.SIGUSR1)
        codes, output = run.end()
        assert codes == [0] * processes and "stopped by SIGUSR1" in output, output
    alone = fork(command("01", *flags, "-b", 8)[1:])
    once_at_work(tmp_path / "run", more_steps=2)
    alone.kill()
    alone.join()
    output = train_sharded(tmp_path, 4, *flags, "-b", 2, script=TWO_D)
    assert "step 0 of 16" not in output
    assert_same(curves("tied"), tmp_path / "run", "moved four times")


OTHERS = ["qwen2", "qwen3", "mistral", "gemma2", "olmo2", "granite", "phi3", "smollm3"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_is_the_same_or_refused(flags, tmp_path, kind):
    flags += [
        *make_of_kind(tmp_path / "model", kind, num_key_value_heads=2),
        *STEPS,
        "--max-steps",
        4,
    ]
    run = Ranks(tmp_path, 4, *flags, "-b", 2, "-e", "run", script=TWO_D)
    codes, output = run.end()
    print(output.splitlines()[-1][:200])
    if codes == [1] * 4:
        assert output.splitlines()[-1].startswith("error: --tensor-parallel 2: this model has ")
        assert kind in ("olmo2", "phi3")
    else:
        assert codes == [0] * 4, output
        train("01", *flags, "-b", 8, "-e", "alone")
        assert_same(metrics(tmp_path / "alone"), tmp_path / "run", kind)


REFUSED = {
    "ranks": ({}, ["--tensor-parallel", 3], "--tensor-parallel 3 does not divide 4 ranks"),
    "fewer than one": ({}, ["--tensor-parallel", -2], "-2 does not divide 4 ranks"),
    "heads": ({"num_key_value_heads": 2}, ["--tensor-parallel", 4], "has 2 key/value heads, and "),
    "width": ({"intermediate_size": 98}, ["--tensor-parallel", 4], "mlp.gate_proj.weight is ("),
    "no plan": ({"kind": "gpt2"}, [], "has no plan that is known here: {}"),
    "a parameter": (
        {"kind": "apertus"},
        [],
        "has a plan that leaves out model.layers",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused_in_one_line(flags, tmp_path, what):
    model, more, error = REFUSED[what]
    run = Ranks(
        tmp_path,
        4,
        *flags,
        *make_of_kind(tmp_path / "model", **{"kind": "llama"} | model),
        *more,
        script=TWO_D,
    )
    codes, _ = run.end(60)
    assert codes == [1] * 4
    for path in run.outputs:
        lines = path.read_text().splitlines()
        assert error in lines[-1] and lines[-1].startswith("error: "), lines
        assert not any("Traceback" in line for line in lines)


# Mistakes that the tests above must find.

ALL_NORM = "norm = torch.stack(norms).norm()"
PLANTED = {
    "embedding and head not tied": ("    model.tie_weights()  # embedding", "    # ", "loss"),
    "the sampler counts ranks": (
        "DistributedSampler(data, mesh.size(), mesh.get_local_rank(), seed",
        "DistributedSampler(data, seed",
        "loss",
    ),
    "the norm of one mesh": (ALL_NORM, "norm = norms[0]", "grad_norm"),
    "the evaluation adds up all ranks": (", group=mesh.get_group())", ")", "val_loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(flags, kinds, curves, tmp_path, mistake):
    old, new, key = PLANTED[mistake]
    (tmp_path / "planted.py").write_text(replaced(TWO_D.read_text(), (old, new)))
    flags += [*kinds["tied"], *STEPS, "-b", 2, "-e", "run"]
    train_sharded(tmp_path, 4, *flags, script=tmp_path / "planted.py")
    expected, found = curves("tied"), metrics(tmp_path / "run")
    worst = {k: worst_difference(expected, found, [k]) for k in ("loss", "grad_norm", "val_loss")}
    print(f"{mistake}: {worst}")
    assert worst[key] > 1e-4


@pytest.mark.slow
def test_a_seed_for_each_rank_is_found(flags, kinds, tmp_path):
    seeds = [f"torch.manual_seed(args.seed + {number})  #" for number in ("group", "rank")]
    (tmp_path / "planted.py").write_text(replaced(TWO_D.read_text(), seeds))
    flags += [*kinds["dropout"], *STEPS, "-b", 2, "--max-steps", 4]
    run = Ranks(tmp_path, 4, *flags, script=tmp_path / "planted.py", start=hashing)
    codes, output = run.end()
    assert codes == [0] * 4, output
    first, second, *_ = hashes(run)
    assert first != second
