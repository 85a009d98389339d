"""The checker of the exercises accepts the stages, and catches and names each planted mistake."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from check_exercise import ALL, Check, Reference, check, processes_of
from checker.mistakes import But
from lab.hosts import wait_for, why_not
from lab.stages import (
    FOLDERS,
    ROOT,
    SHARDED,
    apply,
    blocks_of,
    environment,
    processes_with,
    replaced,
    run_forked,
)

REASON = why_not()
two_hosts = pytest.mark.skipif(bool(REASON) and "CI" not in os.environ, reason=str(REASON))


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("reference"), forked=True)


@pytest.fixture(scope="module")
def right_when_sharded(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("sharded"), "sharded", forked=True)


def source_of(stage):
    return SHARDED if stage == "sharded" else ROOT / FOLDERS[stage] / "train_llm.py"


def changed(stage, tmp_path, *changes):
    """Return a reader's script: the stage's own, with changes, each (old, new)."""
    script = tmp_path / "my_train_llm.py"
    script.write_text(replaced(source_of(stage).read_text(), *changes))
    return script


def one_mistake(stage, script, right, tmp_path):
    """Return the first mistake that is named."""
    results = list(Check(stage, script, right, tmp_path).all())
    wrong = [mistake for _, mistake in results if mistake]
    print(*results, sep="\n")
    assert wrong, "nothing is wrong"
    return wrong[0]


def test_stage_02_holds(right, tmp_path):
    results = dict(Check("02", source_of("02"), right, tmp_path).all())
    assert len(results) == ALL["02"] and not any(results.values()), results


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["02", pytest.param("03", marks=two_hosts), "04"])
def test_the_stages_hold_as_participants_start_it(tmp_path, stage):
    line = [sys.executable, ROOT / "tests" / "check_exercise.py", stage, source_of(stage)]
    env = environment(TMPDIR=tmp_path)
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"all {ALL[stage]} hold" in done.stdout, done.stdout
    assert not list(tmp_path.iterdir()), "left in the temporary folder"


@two_hosts
def test_sharded_holds(right_when_sharded, tmp_path):
    results = dict(Check("sharded", source_of("sharded"), right_when_sharded, tmp_path).all())
    assert len(results) == ALL["sharded"] and not any(results.values()), results


NO_SYNC = "ddp_model.no_sync() if micro_step < micro_steps else nullcontext()"
CLIP = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
AVERAGE = "[(dist.all_reduce(p.grad), p.grad.div_(world_size)) for p in model.parameters()]"
MISTAKES = {
    "micro-steps not divided": (
        ("divmod(args.global_batch_size, args.batch_size * world_size)", "(4, 0)"),
        "the number of micro-steps must be divided by the number of processes",
    ),
    "a sampler told of one process": (
        ("DistributedSampler(data, ", "DistributedSampler(data, 1, 0, "),
        "the sampler is told of one process (num_replicas=1)",
    ),
    "no DistributedSampler": (
        ("indices = list(sampler)", "indices = list(range(len(data)))"),
        "a DistributedSampler is missing, or not used",
    ),
    "no set_epoch": (("sampler.set_epoch(epoch)", "0"), "sampler.set_epoch(epoch)"),
    "an epoch's end not divided": (
        (": epoch_samples // world_size]", ": epoch_samples]"),
        "the second epoch begins too late",
    ),
    "an order of its own": (
        ("DistributedSampler(data, seed=args.seed)", "DistributedSampler(data)"),
        "they are shuffled by another seed: this run has --seed 1, and the sampler is told 0",
    ),
    "a seed for each rank": (
        ("(data, seed=args.seed)", "(data, seed=args.seed + dist.get_rank())"),
        "the ranks' rows overlap",
    ),
    "not shuffled": (("(data, seed=args.seed)", "(data, shuffle=False)"), "the order of the file"),
    "contiguous blocks": (
        ("(data, seed=args.seed)", "(data, 1, 0, seed=args.seed)"),
        (
            "list(sampler)  #",
            "list(sampler)[dist.get_rank() * len(data) // 2 :][: len(data) // 2]#",
        ),
        "its share is a contiguous block",
    ),
    "data made by all ranks at once": (
        ("while rank > 0 and not", "while False and not"),
        "all ranks make them at once",
    ),
    "the model instead of DDP's": (("else ddp_model", "else model"), "must call DDP's model"),
    "always no_sync": ((NO_SYNC, "ddp_model.no_sync()"), "must stand outside no_sync()"),
    "no_sync on the last micro-batch": (
        ("micro_step < micro_steps", "micro_step == micro_steps"),
        "no_sync() is around the last micro-batch instead of the others",
    ),
    "clipped for every micro-batch": (
        ("loss_sum += loss.detach()", f"loss_sum += loss.detach(); {CLIP}"),
        "the gradients are clipped 3 times a step",
    ),
    "clipped before they are averaged": (
        (NO_SYNC, "ddp_model.no_sync()"),
        ("lr = scheduler.get_last_lr()[0]", f"lr = scheduler.get_last_lr()[0]; {AVERAGE}"),
        "clipped before they are averaged",
    ),
    "the sum of the gradients": (
        (NO_SYNC, "ddp_model.no_sync()"),
        (f"grad_norm = {CLIP}", f"{AVERAGE.replace('world_size', '1')}; grad_norm = {CLIP}"),
        "the gradients are 2 times what they should be",
    ),
    "the learning rate multiplied": (
        ("AdamW(model.parameters(), args.lr,", "AdamW(model.parameters(), args.lr * world_size,"),
        "multiplied by the number of ranks?",
    ),
    "the loss of one rank": (
        ("dist.all_reduce(loss_sum)  # the sum over the ranks", "loss_sum *= world_size"),
        "the loss is that of one rank",
    ),
    "the sum of the losses": (
        ("loss_sum.item() / world_size,", "loss_sum.item(),"),
        "without dividing by their number",
    ),
    "accumulation not scaled": (
        ("loss = loss / micro_steps", "loss = loss"),
        "accumulation is scaled wrongly",
    ),
    "scheduler per micro-batch": (
        ("loss_sum += loss.detach()", "loss_sum += loss.detach(); scheduler.step()"),
        "the learning rate is wrong from step",
    ),
    "validation of one rank": (
        ("    dist.all_reduce(loss_sum)\n    model", "    model"),
        "val_loss is",
    ),
    "validation by each rank alone": (
        ("    dist.all_reduce(loss_sum)\n    model", "    model"),
        ("loss_sum.item() / len(data)", "loss_sum.item() / len(range(first, len(data), stride))"),
        ("loss_sum += loss * len(input_ids)", "loss_sum += loss"),
        "val_loss is",
    ),
    "one rank leaves out a collective": (
        (
            "        dist.all_reduce(loss_sum)  #",
            "        if rank == 0: dist.all_reduce(loss_sum)  #",
        ),
        "if rank == 0: dist.all_reduce(loss_sum)",
    ),
    "a rank that sleeps": (
        ("        optimizer.zero_grad()", "        time.sleep(1000 * (rank == 1 and step == 3))"),
        "rank 1 is in line",
    ),
    "no checkpoint, and no end": (
        ("save_now = step % args.ckpt_freq == 0 or step == total_steps", "save_now = False"),
        ("while step < total_steps:", "while True:"),
        "none does: with --ckpt-freq 8",
    ),
    "all ranks save": (
        ("if writes and save_now", "if run_dir and save_now"),
        ("metrics.stat()", "(run_dir / 'metrics.jsonl').stat()"),
        "2 ranks do",
    ),
    "all ranks log": (
        ("writes = run_dir is not None and rank == 0", "writes = run_dir is not None"),
        "every rank writes metrics.jsonl",
    ),
    "the wrapped model saved": (
        ('"model": model.state_dict()', '"model": ddp_model.state_dict()'),
        "its names begin with module.",
    ),
    "the same dropout everywhere": (
        ("if rank > 0:\n        torch.manual_seed", "if rank > 9:\n        torch.manual_seed"),
        "all ranks draw the same",
    ),
    "all on the first GPU": (
        ('torch.device("cuda", rank)', 'torch.device("cuda", 0)'),
        "local rank 1 takes GPU 0",
    ),
    "a GPU that is only named": (
        ("torch.cuda.set_device(device)", "pass"),
        ('("nccl", device)', '("nccl", None)'),
        "torch.device only names one",
    ),
    "only rank 0 restored": (
        (
            'if run_dir and (run_dir / "checkpoint.pt")',
            'if rank == 0 and (run_dir / "checkpoint.pt")',
        ),
        "rank 1 starts over, the other goes on",
    ),
    "only rank 0's weights restored": (
        (
            'model.load_state_dict(checkpoint["model"])',
            "0 if rank else model.load_state_dict(checkpoint['model'])",
        ),
        "the ranks begin with different weights",
    ),
    "one random state for all": (
        ('checkpoint["rng"][rank]', 'checkpoint["rng"][0]'),
        "all ranks take back one rank's",
    ),
    "random states not restored": (
        ('dropout_rng.set_rng_state(checkpoint["rng"][rank])', "0"),
        "it is not restored",
    ),
    "an epoch anew after a resume": (
        ("indices[position // world_size : epoch_samples", "indices[: epoch_samples"),
        "rows again that it has had",
    ),
    "a position not divided": (
        ("indices[position // world_size :", "indices[position :"),
        "it leaves out rows",
    ),
    "an epoch of one rank": (
        (
            "// args.global_batch_size * args.global_batch_size\n",
            "// args.global_batch_size * args.global_batch_size // world_size\n",
        ),
        (": epoch_samples // world_size]", ": epoch_samples]"),
        "the length of an epoch must count those of all ranks",
    ),
    "one seed for more ranks": (
        ("args.seed + rank + world_size * checkpoint", "args.seed + checkpoint"),
        "some ranks draw the same random numbers",
    ),
    "the random states of one rank": (
        ("== (device.type, world_size)", "== (device.type, 1)"),
        ('"rng_of": (device.type, world_size)', '"rng_of": (device.type, 1)'),
        "rng_of must say how many there were",
    ),
    "a default that does not grow": (
        ("args.global_batch_size or args.batch_size * world_size", "args.global_batch_size or 2"),
        "does its default grow with the ranks?",
    ),
    "scheduler not restored": (
        ('scheduler.load_state_dict(checkpoint["scheduler"])', "0"),
        "is the scheduler restored?",
    ),
    "optimizer not restored": (
        ('optimizer.load_state_dict(checkpoint["optimizer"])', "0"),
        "are weights and optimizer both restored",
    ),
}


def some_slow(mistakes, *fast):
    """Return parameters of which only some are tried by default."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in mistakes]


FAST = ["micro-steps not divided", "no set_epoch", "always no_sync", "the loss of one rank"]
FAST += ["all ranks save", "the same dropout everywhere", "only rank 0's weights restored"]


@pytest.mark.parametrize("mistake", some_slow(MISTAKES, *FAST))
def test_a_planted_mistake_is_named(right, tmp_path, mistake):
    *changes, message = MISTAKES[mistake]
    found = one_mistake("02", changed("02", tmp_path, *changes), right, tmp_path)
    assert message in found
    assert not processes_of(tmp_path / "first") | processes_of(tmp_path / "second")


REMARKS = {
    "one wandb run for all": (
        ('id=f"{args.experiment_name}-rank{rank}"', "id=args.experiment_name"),
        "2 ranks write to one (run): the last one wins",
    ),
    "a barrier while the data is made": (
        ('    while rank > 0 and not store.check(["data is ready"]):\n', "    if rank > 0:\n"),
        ("        time.sleep(0.5)\n", "        dist.barrier()\n"),
        ("    dist.barrier()  # now all", "    if rank == 0: dist.barrier()  # now all"),
        "wait for them in a collective (barrier), which gives up after minutes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("remark", REMARKS)
def test_what_holds_but_is_unwise_gets_a_remark(right, tmp_path, remark):
    *changes, text = REMARKS[remark]
    script = changed("02", tmp_path, *changes)
    results = dict(Check("02", script, right, tmp_path).all())
    (said,) = filter(None, results.values())
    assert isinstance(said, But) and text in said and len(results) == ALL["02"]


def test_a_device_by_the_rank_is_named(right, tmp_path):
    """In stage 03, where the local rank is not the rank."""
    new = 'torch.device("cuda", rank % torch.cuda.device_count())'
    script = changed("03", tmp_path, ('torch.device("cuda", local_rank)', new))
    ((what, wrong),) = Check("03", script, right, tmp_path).device()
    assert "local rank 1 takes GPU 0" in wrong and "rank % device_count" in wrong


NUMBERS = "args.node_rank * args.nproc_per_node + local_rank"
NODES = {
    "a rank that counts the other way": (
        (NUMBERS, "local_rank * args.nnodes + args.node_rank"),
        "they are 1 and 3: rank = node rank x processes of a node + local rank",
    ),
    "the world of one node": (
        ("world_size = args.nnodes * args.nproc_per_node", "world_size = args.nproc_per_node"),
        (NUMBERS, "local_rank"),
        "the world size is 2: number of nodes x processes of a node",
    ),
}


@pytest.mark.parametrize("mistake", NODES)
def test_ranks_that_are_right_on_one_node_only_are_named(right, tmp_path, mistake):
    *changes, message = NODES[mistake]
    script = changed("04", tmp_path, *changes)
    ((_, wrong),) = Check("04", script, right, tmp_path).device()
    assert message in wrong


@two_hosts
@pytest.mark.slow
def test_nodes_that_train_apart_are_named(right, tmp_path):
    script = changed("04", tmp_path, *NODES["the world of one node"][:2])
    assert "world_size is not 2" in one_mistake("04", script, right, tmp_path)


def test_rows_that_spawned_processes_do_not_find_are_named(right, tmp_path):
    script = changed("04", tmp_path, ('tokenize_and_pack.__module__ = "__main__"', ""))
    assert "mp.spawn runs the script as __mp_main__" in one_mistake("04", script, right, tmp_path)


LOCAL_NORM = (
    "grad_norm = torch.stack([p.grad.to_local().norm() for p in model.parameters()]).norm()"
)
MISTAKES_IN_SHARDING = {
    "nothing": (
        ("load_model(args, weights=rank == 0)", "load_model(args)"),
        ("shard(model.train(), device, args.compile, args.recompute)", "model.train()"),
        "nothing is sharded",
    ),
    "only the root": (
        ("        fully_shard(block, reshard_after_forward=True)", "        pass"),
        "only the root is (GPT2LMHeadModel)",
    ),
    "the norm of one rank's part": (
        (f"grad_norm = {CLIP}", f"{CLIP}; {LOCAL_NORM}"),
        "the norm of the gradients is that of one rank's parts",
    ),
    "an evaluation that hangs": (
        ("range(first, len(data) + first, stride)", "range(first, len(data), stride)"),
        "it hangs",
    ),
    "a checkpoint of parts": (
        ("lambda parts: parts.full_tensor().to(memory)", "lambda parts: parts.to_local()"),
        "is only a part",
    ),
}


PAGE_2D = "03-multi-node/two_dimensions.md"
SPLIT = "    split(model)\n"
SAME_ROWS = "DistributedSampler(data, 1, 0, seed=args.seed), 1"
OUT = "    @staticmethod\n    def backward(ctx, gradient):\n        return gradient\n"
PARTS = 'parts = [p.grad for p in parameters if hasattr(p, "is_part")]'
NORM = "norm = (squares + torch.nn.utils.get_total_norm(others) ** 2).sqrt()"
HEAD = "    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())\n"
MISTAKES_IN_TP = {
    "other rows": (
        (SAME_ROWS, "DistributedSampler(data, seed=args.seed), dist.get_world_size()"),
        "the ranks read different rows",
    ),
    "nothing on the way in": (("Enter.apply(output)", "output"), "in the backward pass"),
    "nothing on the way out": (
        ("Leave.apply(output - linear.bias)", "output - linear.bias"),
        "so the forward pass is",
    ),
    "a bias of each rank": (
        ("Leave.apply(output - linear.bias) + linear.bias", "Leave.apply(output)"),
        "each rank adds it before the all-reduce",
    ),
    "once too many": ((OUT, "    backward = Enter.backward\n"), "an all-reduce too many"),
    "the norm of one rank": (("    dist.all_reduce(squares)\n", ""), "that of one rank's parts"),
    "the norm of all": (
        (PARTS, "parts = [p.grad for p in parameters]"),
        (NORM, "norm = squares.sqrt()"),
        "counts twice what both ranks have whole",
    ),
    "the loss of all": (("loss_sum.item(),", "loss_sum.item() / world_size,"), "is 0.5 times"),
    "the evaluation of all": (
        (
            "    model.train()\n    return",
            "    dist.all_reduce(loss_sum)\n    model.train()\n    return",
        ),
        "val_loss is summed over the ranks",
    ),
    "a seed for each": ((SPLIT, SPLIT + "    torch.manual_seed(rank)\n"), "one seed for those"),
    "nothing split": ((SPLIT, ""), "nothing is split"),
    "untied": ((SPLIT, SPLIT + HEAD), "1 parameters too many"),
}


@pytest.fixture(scope="module")
def right_when_shared(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("right-tp"), "tp", forked=True)


def my_tp(tmp_path, *changes):
    """Return stage 02 with the solution of two_dimensions.md, changed."""
    (solution,) = [diff for diff in blocks_of(PAGE_2D, "diff") if "@@ main: batches" in diff]
    script = tmp_path / "my_tp.py"
    script.write_text(replaced(apply(solution, source_of("02").read_text()), *changes))
    return script


def test_tensor_parallelism_by_hand_holds(right_when_shared, tmp_path):
    results = dict(Check("tp", my_tp(tmp_path), right_when_shared, tmp_path).all())
    assert len(results) == ALL["tp"] and not any(results.values()), results


@pytest.mark.parametrize("mistake", some_slow(MISTAKES_IN_TP, "the norm of one rank"))
def test_a_mistake_in_tensor_parallelism_is_named(right_when_shared, tmp_path, mistake):
    *changes, message = MISTAKES_IN_TP[mistake]
    assert message in one_mistake("tp", my_tp(tmp_path, *changes), right_when_shared, tmp_path)


def solution_by_hand():
    readme = (ROOT / FOLDERS["02"] / "README.md").read_text()
    return re.search(r"```python\n(class MyDDP.*?)```", readme, re.DOTALL)[1]


def my_ddp(tmp_path, *changes):
    """Return stage 02 with the solution of its README, changed."""
    solution = replaced(solution_by_hand(), *changes)
    return changed(
        "02",
        tmp_path,
        ("import nullcontext", "import contextmanager, nullcontext"),
        ("@record ", f"{solution}\n\n@record "),
        ("DDP(model, gradient_as_bucket_view=True)", "MyDDP(model)"),
        ("        grad_norm = torch", "        ddp_model.wait()\n        grad_norm = torch"),
    )


def test_ddp_written_by_hand_holds(right, tmp_path):
    results = dict(Check("ddp", my_ddp(tmp_path), right, tmp_path).all())
    assert len(results) == ALL["ddp"] and not any(results.values()), results


MISTAKES_BY_HAND = {
    "after backward()": (
        ("parameter.register_post_accumulate_grad_hook(self.start)", "pass"),
        (
            "while self.works:",
            "for p in self.module.parameters(): self.start(p)\n        while self.works:",
        ),
        "the first one begins after backward() has ended",
    ),
    "weights never sent": (
        ("dist.broadcast(tensor.detach(), src=0)", "pass"),
        "each rank starts from weights of its own",
    ),
    "the sum": (
        ("parameter.grad /= dist.get_world_size()", "pass"),
        "the gradients are 2 times what they should be",
    ),
    "not waited for": (("self.works.pop().wait()", "self.works.pop()"), "gradients"),
    "other weights at the start": (
        ("src=0)", "src=0)\n            tensor.data += dist.get_rank() * 1e-7"),
        "the weights at step 1 are not",
    ),
}


@pytest.mark.parametrize("mistake", some_slow(MISTAKES_BY_HAND, "the sum"))
def test_a_mistake_in_ddp_by_hand_is_named(right, tmp_path, mistake):
    *changes, message = MISTAKES_BY_HAND[mistake]
    script = my_ddp(tmp_path, *changes)
    if mistake == "after backward()":  # the first part of the exercise: all else is looked at
        found = check("ddp", script, right, tmp_path, print)
        assert [part["why"] for part in found["parts"][:-1]] == [None] * (ALL["ddp"] - 1), found
        assert message in found["parts"][-1]["why"]
        short = f"the first part holds, all {ALL['ddp'] - 1}; the second asks for overlap"
        assert found["in short"] == short
    else:
        assert message in one_mistake("ddp", script, right, tmp_path)


def test_an_averaging_that_is_torch_s_is_named(right, tmp_path):
    assert "is torch's DDP" in one_mistake("ddp", source_of("02"), right, tmp_path)


TIED = """
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = (torch.nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).tanh()).square().mean()


SOLUTION

dist.init_process_group("gloo")
gradients = []
for wrap in (lambda model: DDP(model, find_unused_parameters=True), MyDDP):
    torch.manual_seed(dist.get_rank())  # so the weights are rank 0's only if they are sent
    model = Tied()
    ddp_model = wrap(model)
    torch.manual_seed(100 + dist.get_rank())
    with ddp_model.no_sync():
        ddp_model(x=torch.randn(4, 8)).backward()
    ddp_model(x=torch.randn(4, 8)).backward()
    if wrap is MyDDP:
        ddp_model.wait()
    gradients.append([p.grad for p in model.parameters()])
for theirs, mine in zip(*gradients, strict=True):
    assert (theirs is None or not theirs.any()) if mine is None else torch.allclose(theirs, mine)
assert [grad is None for grad in gradients[1]].count(True) == 2, "the unused weight and bias"
total = sum(float(grad.sum()) for grad in gradients[1] if grad is not None)
print(f"equal {total}\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_ddp_written_by_hand_with_tied_weights_and_an_unused_parameter(tmp_path):
    script = tmp_path / "tied.py"
    script.write_text(TIED.replace("SOLUTION", solution_by_hand()))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = run_forked(line, 60)
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.split("equal ")[1:]
    assert one.strip() == other.strip(), "not the same on both ranks"


@two_hosts
@pytest.mark.parametrize("mistake", some_slow(MISTAKES_IN_SHARDING, "only the root"))
def test_a_mistake_in_sharding_is_named(right_when_sharded, tmp_path, mistake):
    *changes, message = MISTAKES_IN_SHARDING[mistake]
    script = changed("sharded", tmp_path, *changes)
    assert message in one_mistake("sharded", script, right_when_sharded, tmp_path)


def start_checker(*words, **env):
    line = [sys.executable, ROOT / "tests" / "check_exercise.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment(**env), **pipes)


def test_several_scripts_get_a_line_each_or_json(tmp_path):
    """These do not start: they are shown with what they said."""
    scripts = [tmp_path / "my_one.py", tmp_path / "my_other.py"]
    for script in scripts:
        script.write_text(f"import torch\nraise ValueError('{script.name}: not ready yet')\n")
    both = [start_checker("02", *scripts), start_checker("02", *scripts, "--json")]
    (said, _), (found, _) = (checker.communicate() for checker in both)
    assert [checker.returncode for checker in both] == [1, 1]
    assert "WRONG  it trains" in said and "ValueError: my_one.py: not ready yet" in said
    lines = said.splitlines()[-2:]
    for script, line, one in zip(scripts, lines, json.loads(found), strict=True):
        first = "it trains, with two processes, and logs 8 steps"
        text = "1 of 1 do not hold; 16 more were not tried"
        assert " ".join(line.split()) == f"{script} {text}: {first}"
        assert one["script"] == str(script) and one["in short"] == text and not one["all hold"]
        assert [part["what"] for part in one["parts"]] == [first]
        assert f"{script.name}: not ready yet" in one["parts"][0]["why"]


def test_ctrl_c_ends_all_without_a_traceback(tmp_path):
    checker = start_checker("02", source_of("02"), TMPDIR=tmp_path)
    while "until rank 0 is killed" not in checker.stdout.readline():
        pass
    time.sleep(1)
    checker.send_signal(signal.SIGINT)
    _, said = checker.communicate(timeout=60)
    assert (checker.returncode, said) == (130, "stopped\n")
    assert not list(tmp_path.iterdir()) and not processes_with(f"TMPDIR={tmp_path}")


@two_hosts
@pytest.mark.slow
def test_sharding_what_all_ranks_have_made_from_one_seed_holds(right_when_sharded, tmp_path):
    changes = [("load_model(args, weights=rank == 0)", "load_model(args)")]
    changes.append(("dist.broadcast(tensor.data, 0)", "pass"))
    script = changed("sharded", tmp_path, *changes)
    results = dict(Check("sharded", script, right_when_sharded, tmp_path).all())
    assert len(results) == ALL["sharded"] and not any(results.values()), results


@pytest.mark.slow
def test_without_no_sync_all_holds(right, tmp_path):
    """It costs time, and changes nothing."""
    script = changed("02", tmp_path, (NO_SYNC, "nullcontext()"))
    results = dict(Check("02", script, right, tmp_path).all())
    assert len(results) == ALL["02"] and not any(results.values()), results


def test_two_ranks_with_one_number(right, tmp_path):
    """Stage 04's exercise: the second one cannot serve the store, the first one waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}
    env = environment(LOCAL_WORLD_SIZE=2, LOCAL_RANK=0, **env)
    line = [sys.executable, ROOT / FOLDERS["03"] / "train_llm.py", *map(str, right.flags)]
    runs = [subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        wait_for(lambda: any(run.poll() is not None for run in runs), what="one fails")
        ended = [run for run in runs if run.poll() is not None]
        assert len(ended) == 1
        assert ended[0].returncode == 1 and "EADDRINUSE" in ended[0].stderr.read()
    finally:
        for run in runs:
            run.kill()
            run.communicate()
