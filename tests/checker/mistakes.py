"""What a script that is checked has done wrong, told from what its ranks have noted and logged.

Each function returns the likely mistake in one sentence, or None. Notes are a list for each rank,
as recorder/ writes them; rows are a list for each step; a curve is {step: row of metrics.jsonl}.
"""

import re

import torch
from lab.stages import rows_read

MICRO_STEPS, MICRO_BATCH, GLOBAL_BATCH = 2, 2, 8
EPOCH = 6  # steps
STOP, END = 8, 16  # the first run dies at step 8, the second goes on
RANKS, MORE_RANKS = 2, 4
SEED = 1  # not the default


def why_it_stopped(notes, stacks, script, output):
    """Where the ranks hang, or how they differ, or what the script said."""
    source, said = script.read_text().splitlines(), tail(output)

    def at(line):
        text = "".join(source[line - 1 : line]) if line else ""  # none in a file that it imports
        return f"line {line}: {text.strip()}" if line else "a library"

    if stacks:
        places = []
        for rank, stack in enumerate(stacks):
            lines = re.findall(rf'File "{re.escape(str(script))}", line (\d+)', stack)
            where = f"is in {at(int(lines[0]) if lines else None)}"
            places.append(f"rank {rank} {where if stack else 'has ended, or goes on alone'}")
        return (
            "it hangs. Each rank must enter the same collectives in the same order, and here\n"
            + "\n".join(f"         | {place}" for place in places)
        )
    for calls in zip(*map(collectives, notes), strict=False):
        if len({call for call, _ in calls}) > 1:
            places = [f"rank {r} enters {c} in {at(line)}" for r, (c, line) in enumerate(calls)]
            text = "\n".join(f"         | {place}" for place in places)
            return f"the ranks enter different collectives:\n{text}\n         It said:\n{said}"
    lines = re.findall(rf'File "{re.escape(str(script))}", line (\d+)', output)
    where = f" (in {at(int(lines[-1]))})" if lines else ""
    return f"it said{where}:\n{said}"


def collectives(notes):
    """Return (name, line of the script) of what a rank has entered, backward() included."""
    skip = ("__init__", "forward", "no_sync", "clip", "end of backward", "fully_shard")
    return [(note["call"], note["line"]) for note in notes if note.get("call", skip[0]) not in skip]


def why_it_goes_on(code, left, seconds):
    if code is None:
        return f"the others still ran after {seconds:.0f} s: what are they waiting for?"
    if left:
        return f"{left} processes were left behind"
    if code == 0:
        return "the exit status was 0: a scheduler would take it for a success"
    return None


def saving_ranks(notes, run_dir):
    return sum(any(str(run_dir) in note.get("save", "") for note in rank) for rank in notes)


def why_none_writes(notes, run_dir):
    if not saving_ranks(notes, run_dir):
        return f"none does: with --ckpt-freq {STOP} there should be one after step {STOP}."
    return None


def why_not_one_writes(notes, run_dir):
    saving = saving_ranks(notes, run_dir)
    if saving != 1:
        return f"{saving} ranks do: they overwrite each other's file. Save if rank == 0."
    return None


class But(str):
    """A remark on what holds."""


def why_not_made_once(notes):
    """The rows of tokens: rank 0 makes them, the others find them in the cache."""
    maps = [[note for note in rank if "map" in note] for rank in notes]
    if any(note["module"] == "__mp_main__" for rank in maps for note in rank):
        return (
            "they are made again: mp.spawn runs the script as __mp_main__, and `datasets`, which "
            'asks for the function\'s module, no longer knows it: set its __module__ = "__main__".'
        )
    ends = [note["map"][1] for note in maps[0]]
    begins = [note["map"][0] for rank in maps[1:] for note in rank]
    if ends and begins and min(begins) < max(ends):
        return (
            "all ranks make them at once: let the others wait until rank 0 has made them, and says "
            "so in the store (dist.group.WORLD.get_group_store() has set and check)."
        )
    before = [
        collectives(rank[: rank.index(made[0])])
        for rank, made in zip(notes, maps, strict=True)
        if made
    ]
    if any(len(calls) > len(before[0]) for calls in before[1:]):
        return But(
            f"the others wait for them in a collective ({before[-1][-1][0]}), which gives up after "
            "minutes, and making the rows of much data takes hours. Let them ask the store: "
            "dist.group.WORLD.get_group_store() has set and check."
        )
    return None


def why_not_a_run_each(notes):
    """wandb: what ranks have begun."""
    begun = [note["wandb"] for rank in notes for note in rank if "wandb" in note]
    if len(begun) > len(set(begun)):
        return But(
            f"{len(begun)} ranks write to one ({begun[0]}): the last one wins. An id per rank, or "
            'mode="disabled" on all but rank 0.'
        )
    return None


def why_not_the_rows(right, notes):
    """The rows that the ranks read, against stage 01's."""
    if not all(map(rows_read, notes)):
        return "one rank reads nothing"
    mine = rows_of(notes)
    if same_rows(mine, right):
        return None
    told = [note for rank in notes for note in rank if "num_replicas" in note]
    ranks = [rows_of([rank], GLOBAL_BATCH // RANKS) for rank in notes]
    if all(one == other for one, other in zip(*ranks, strict=False)):  # up to where one died
        if any(note["num_replicas"] == 1 for note in told):
            return (
                "every rank reads the same data: the sampler is told of one process "
                "(num_replicas=1). Without num_replicas and rank it asks the group."
            )
        return "every rank reads the same data: a DistributedSampler is missing, or not used."
    if len(rows_read(notes[0])) >= STOP * GLOBAL_BATCH:
        return (
            f"each rank reads {GLOBAL_BATCH} rows a step, so all of them {GLOBAL_BATCH * RANKS}: "
            "the number of micro-steps must be divided by the number of processes."
        )
    if same_rows(mine[:EPOCH], right[:EPOCH]):
        if mine[EPOCH:] and mine[EPOCH] == mine[0]:
            return "the order of the second epoch is that of the first: sampler.set_epoch(epoch)."
        unseen = set(sum(mine[EPOCH : EPOCH + 1], [])) - set(sum(right[:EPOCH], []))
        if len(unseen) > GLOBAL_BATCH // 2:  # of the rows that are left over
            return "the second epoch begins too late: where does each rank's part of it end?"
        return "the second epoch is wrong, the first is right: does the sampler know the epoch?"
    one, other = (sum(rank[:EPOCH], []) for rank in ranks)
    if all(part == sorted(part) for part in (one, other)):
        return "they are in the order of the file: shuffle, as stage 01 does."
    if set(one) & set(other):
        return (
            "the ranks' rows overlap: each shuffles in another way. One seed for all of them, and "
            "then each takes its share."
        )
    if sorted(sum(ranks[0][:RANKS], [])) == sorted(right[0]):
        return (
            "rank 0 reads in two steps what all ranks together should read in the first: its share "
            "is a contiguous block. Take every second row: rank, rank + world size, ..."
        )
    if any(note["seed"] != SEED for note in told):
        return (
            f"they are shuffled by another seed: this run has --seed {SEED}, and the sampler is "
            f"told {told[0]['seed']}: seed=args.seed."
        )
    return "the ranks do not read the rows of stage 01: seed, drop_last, and who takes which?"


def why_not_the_same_rows(right, notes):
    """Tensor parallelism: each rank reads all rows that stage 01 reads."""
    if not all(map(rows_read, notes)):
        return "one rank reads nothing"
    for rank in notes:
        mine = rows_of([rank])[:STOP]
        if not same_rows(mine, right[: len(mine)]):
            return (
                "the ranks read different rows, and those who share a layer must work on the same: "
                "DistributedSampler(data, 1, 0, ...), and no division by the number of ranks, in "
                "micro-steps and in the slice of an epoch."
            )
    return None


def why_not_shared(reference, mine, notes):
    """Tensor parallelism: the metrics of the first steps, and what each rank's parameters did."""
    curve, parameters = reference.curve, reference.parameters
    right, first, last = curve[1], mine[0], mine[-1]
    steps = [steps_of(rank) for rank in notes]
    if not all(steps):
        return "one rank never steps an optimizer."
    ranks = [rank[0]["each"] for rank in steps]
    if len(set(map(len, ranks))) > 1:
        return "the ranks have different numbers of parameters with a gradient."
    if len(ranks[0]) > parameters:
        return (
            f"{len(ranks[0]) - parameters} parameters too many: embedding and head were one. Tie "
            "them again after the split, or leave them whole."
        )
    whole = [one[0] == other[0] for one, other in zip(*ranks, strict=True)]  # equal weights
    if all(whole):
        return "nothing is split: every rank has the same weights."
    loss = first["loss"] / right["loss"]
    if near(loss, RANKS) or near(loss, 1 / RANKS):
        return f"the loss is {loss:.2g} times what it should be: all have it, so none adds up."
    if not near(loss, 1) and near(first["loss"], reference.loss_with_biases_of_all()):
        return (
            "the loss of step 1 is that of a model whose o and down have twice their bias: each "
            "rank adds it before the all-reduce. Add it once, after it."
        )
    if not near(loss, 1):
        return (
            "the loss of step 1 is wrong, so the forward pass is. Rows of q, k, v, gate and up "
            "(and of their biases), columns of o and down, of this rank; one all-reduce after o "
            "and one after down."
        )
    # The optimizer has seen the gradients after clipping, by the norm that was logged; or each rank
    # has clipped by its own, and now has a norm of 1.
    own, norm = "the norm is that of one rank's parts: add up all squares.", first["grad_norm"]
    if norm > 1 and all(near(sum(each**2 for _, each in rank), 1) for rank in ranks):
        return own
    squares = [[(each * max(1, norm)) ** 2 for _, each in rank] for rank in ranks]
    shared, other = ([x for x, same in zip(rank, whole, strict=True) if same] for rank in squares)
    if not all(near(a, b) for a, b in zip(shared, other, strict=True)):
        return (
            "the loss is right, but what both ranks have whole (norms, embedding) gets another "
            "gradient on each: each has a summand of the gradient of what goes into attention and "
            "MLP. All-reduce it there, in the backward pass: after the norm, where the residual "
            "has branched off."
        )
    cut = [x for rank in squares for x, same in zip(rank, whole, strict=True) if not same]
    true = (sum(shared) + sum(cut)) ** 0.5
    if near(true, right["grad_norm"]) and not near(norm, true):
        if near(norm, sum(squares[0]) ** 0.5):
            return own
        if near(norm, (2 * sum(shared) + sum(cut)) ** 0.5):
            return "the norm counts twice what both ranks have whole: only parts add up over ranks."
        return "the gradients are right, their norm is not."
    if not near(norm, right["grad_norm"]):
        return (
            "the loss of step 1 is right, the gradients are equal where they should be, and wrong: "
            "an all-reduce too many in the backward pass? On the way out the gradient stays as it "
            "is."
        )
    for number, step in enumerate(zip(*steps, strict=False), start=1):
        one, other = (rank["each"] for rank in step)
        if any(same and a[0] != b[0] for same, a, b in zip(whole, one, other, strict=True)):
            return f"what both ranks have whole is no longer equal at step {number}."
    wrong = why_not_the_curve(curve, mine, notes)
    if wrong and near(last["val_loss"], RANKS * curve[last["step"]]["val_loss"]):
        return "val_loss is summed over the ranks: all have seen the same rows, so none adds up."
    return wrong


def why_other_numbers(notes):
    """Random numbers of ranks that share layers."""
    if len({steps_of(rank)[0]["rng"][0] for rank in notes}) > 1:
        return (
            "each draws its own, so dropout drops other units of what all compute: one seed for "
            "those who share a layer."
        )
    return None


def why_not_sharded(notes):
    """Parameters of stage 03, sharded: each rank keeps a part of each."""
    modules = [note["module"] for note in notes[0] if note.get("call") == "fully_shard"]
    if not modules:
        return "nothing is sharded: fully_shard(block) for each block, then fully_shard(model)."
    if not is_sharded(notes):
        return "the optimizer still has the whole parameters: make it after fully_shard."
    if len(modules) == 1:
        return (
            f"only the root is ({modules[0]}): a forward pass gathers all of the model at once. "
            "fully_shard each block first."
        )
    return None


def why_not_the_curve(curve, mine, notes):
    """The metrics of the first steps."""
    (right, first), last = (curve[1], mine[0]), mine[-1]
    begin = {steps_of(rank)[0]["weights"] for rank in notes}
    if not near(first["loss"], right["loss"]) and len(begin) > 1 and not is_sharded(notes):
        return (
            "each rank starts from weights of its own (here no seed makes them equal): when you "
            "wrap the model, send rank 0's to all, dist.broadcast(tensor, src=0), buffers too."
        )
    loss, norm = (first[key] / right[key] for key in ("loss", "grad_norm"))
    if not near(loss, 1) and near(norm, 1):
        if near(loss, MICRO_STEPS) or near(loss, 1 / MICRO_STEPS):
            return (
                f"the gradients are right, the loss is {loss:.2g} times what it should be: is it "
                "summed over the ranks without dividing by their number?"
            )
        return "the gradients are right, the loss is that of one rank: all_reduce it, and divide."
    if near(loss, norm) and not near(loss, 1):
        return (
            f"loss and gradients are {loss:.2g} times what they should be: accumulation is scaled "
            "wrongly. Divide each micro-batch's loss by their number, once."
        )
    if not near(norm, 1):
        return why_not_the_gradients(norm, notes)
    for row in mine:
        rate = curve[row["step"]]["lr"]
        if rate and near(row["lr"] / rate, RANKS):
            return (
                f"the learning rate is {RANKS} times that of stage 01: multiplied by the number of "
                "ranks? The global batch is the same, and so the rate must be."
            )
        if not near(row["lr"], rate):
            return (
                f"the learning rate is wrong from step {row['step']} on: scheduler.step() once per "
                "step, not per micro-batch."
            )
    for row in mine:
        if not near(row["loss"], curve[row["step"]]["loss"]):
            return (
                f"step {row['step']} is the first whose loss differs: the gradients of step 1 were "
                "right, so what the optimizer did with them was not. Is zero_grad() called once a "
                "step, clipping done after the last micro-batch?"
            )
    if "val_loss" in last and not near(last["val_loss"], curve[last["step"]]["val_loss"], 1e-5):
        return "val_loss is wrong: each rank has seen a part only; all_reduce the sum, then divide."
    return None


def why_not_the_gradients(norm, notes):
    """norm: that of step 1, as a share of what it should be; the loss is right."""
    first = [until_first_step(rank) for rank in notes]
    calls = [note["call"] for note in first[0] if "call" in note]
    step, clip = ([rank[key] for rank in map(summary, first)] for key in ("step", "clip"))
    if is_sharded(notes) and norm < 1:
        return "the norm of the gradients is that of one rank's parts: add up the squares of all."
    if calls.count("clip") > 1:
        return (
            f"the gradients are clipped {calls.count('clip')} times a step, before they are "
            "complete: once, after the last micro-batch."
        )
    if len(set(step)) == 1 < len(set(clip)):
        return "the gradients are clipped before they are averaged: each rank scales its own."
    if near(norm, RANKS) or near(norm, 1 / RANKS):
        return (
            f"the loss is right, the gradients are {norm:.2g} times what they should be: they "
            "must be averaged over the ranks, and the loss divided by the micro-batches. (AdamW "
            "hardly notices such a factor, clipping and other optimizers do.)"
        )
    if len(set(step)) == 1:
        return (
            "the loss of step 1 is right, its gradients are equal on all ranks, and wrong: are "
            "they averaged more than once, or before the last micro-batch is in them?"
        )
    text = "the loss of step 1 is right, its gradients are not averaged over the ranks: "
    if "forward" not in calls and not set(calls) & {"all_reduce", "reduce_scatter_tensor"}:
        return text + "the training must call DDP's model, not the one that DDP wraps."
    if "no_sync" in calls:
        order = [call for call in calls if call in ("no_sync", "backward")]
        if order[-2:] == ["no_sync", "backward"] and order.count("no_sync") == 1:
            return text + "no_sync() is around the last micro-batch instead of the others."
        return text + "backward() of the last micro-batch must stand outside no_sync()."
    return text + "every parameter's, once a step, after the last micro-batch's backward()?"


def why_not_equal(notes):
    """Weights and gradients of the ranks at each step."""
    for step, ranks in enumerate(zip(*map(steps_of, notes), strict=False), start=1):
        for what, key in (("weights", "weights"), ("gradients", "step")):
            if len({rank[key] for rank in ranks}) > 1:
                return f"the {what} at step {step} are not: each rank now trains its own model."
    return None


def why_not_other_numbers(notes):
    """Random numbers, for dropout: each rank has its own."""
    if len({steps_of(rank)[0]["rng"][0] for rank in notes}) == 1:
        return (
            "all ranks draw the same, so dropout drops the same units everywhere: once the weights "
            "are made, torch.manual_seed(args.seed + rank)."
        )
    return None


def why_not_interchangeable(mine, reference):
    """Two checkpoint files: names and shapes of the weights."""
    try:
        # The reader's own file: it may hold what only pickle can load.
        mine = torch.load(mine, map_location="cpu", weights_only=False)["model"]
    except Exception as error:
        return f"it has no model that could be loaded: {type(error).__name__}: {error}"
    right = torch.load(reference, map_location="cpu")["model"]
    extra, missing = sorted(mine.keys() - right.keys()), sorted(right.keys() - mine.keys())
    if extra and extra[0].startswith(("module.", "_orig_mod.")):
        return (
            f"its names begin with {extra[0].split('.')[0]}., as {extra[0]}: save the model's "
            "state, not that of the wrapper."
        )
    if extra or missing:
        return f"it has other names: {(extra or missing)[0]}"
    for name, tensor in mine.items():
        if type(tensor) is not torch.Tensor or tensor.shape != right[name].shape:
            return f"{name} is only a part, {type(tensor).__name__}: gather it before you save."
    return None


def why_not_your_own(notes):
    """An averaging: is it torch's?"""
    if any(note.get("call") == "forward" for note in notes[0]):
        return "the averaging is torch's DDP: here it is to be yours."
    return None


def why_no_overlap(notes):
    """Of an averaging that is not torch's: when its first all-reduce begins."""
    calls = [note["call"] for note in notes[0] if "call" in note]
    inside = False
    for call in calls:
        if call in ("backward", "end of backward"):
            inside = call == "backward"
        elif call == "all_reduce" and inside:
            return None
    return (
        "the first one begins after backward() has ended: start it in a hook, "
        "parameter.register_post_accumulate_grad_hook."
    )


def why_not_from_the_checkpoint(first, second):
    """Why a second run ended badly, told from where the ranks began to read; else None."""
    begins = [[rows_read(rank)[:8] for rank in notes] for notes in (first, second)]
    same = [bool(one) and one == other for one, other in zip(*begins, strict=True)]
    if any(same) and not all(same):
        rank = same.index(True)
        return f"rank {rank} starts over, the other goes on: every rank must load the checkpoint."
    return None


def why_not_the_next_rows(right, notes):
    resumed = rows_of(notes)
    if same_rows(resumed, right[STOP:]):
        return None
    if not resumed or sorted(resumed[0]) in map(sorted, right[:STOP]):
        return (
            "it reads rows again that it has had: step x global batch says which epoch it is and "
            "where in it to go on."
        )
    if same_rows(resumed[:1], right[EPOCH + RANKS * (STOP - EPOCH) :][:1]):
        return (
            "it leaves out rows: a rank's list holds its own rows only, and position counts those "
            "of all ranks. Divide it by the world size."
        )
    return (
        "it reads other rows: epoch and position come from the samples that all ranks have seen, "
        "and the length of an epoch must count those of all ranks, too."
    )


def why_not_resumed(curve, mine, notes):
    weights = [steps_of(rank)[0]["weights"] for rank in notes]
    if len(set(weights)) > 1 and not is_sharded(notes):
        return "the ranks begin with different weights: every rank must load the checkpoint."
    for row in mine:
        right = curve[row["step"]]
        if not near(row["lr"], right["lr"]):
            return f"the learning rate of step {row['step']} is wrong: is the scheduler restored?"
        if not near(row["loss"], right["loss"]):
            return (
                f"step {row['step']} is the first whose loss differs: are weights and optimizer "
                "both restored, on every rank?"
            )
    return None


def why_not_its_own_numbers(first, second):
    """Random states before step 9 and after step 8."""
    saved = [steps_of(rank)[STOP - 1]["rng"][1] for rank in first]
    found = [steps_of(rank)[0]["rng"][0] for rank in second]
    if found == saved:
        return None
    if len(set(found)) == 1:
        return (
            "all ranks take back one rank's, so dropout drops the same units everywhere: "
            "all_gather_object them, save them all, and give each rank its own."
        )
    return "it is not restored: the dropout of a resumed run is another than without the stop."


def why_not_with_more_ranks(code, curve, right, mine, notes, said):
    """What goes wrong on another number of ranks. mine: {step: row}; said: what it said, if so."""
    if code != 0 or END not in mine:
        if "global-batch-size" in said or "global_batch_size" in said:
            return (
                f"{said}\n         This time without --global-batch-size, and with {MORE_RANKS} "
                f"ranks x -b {MICRO_BATCH}: does its default grow with the ranks?"
            )
        if "IndexError" in said or "rng" in said:
            return (
                f"{said}\n         The checkpoint has the random states of {RANKS} ranks, and now "
                f"there are {MORE_RANKS}: rng_of must say how many there were, so that they are "
                "not used."
            )
        return said
    if not same_rows(rows_of(notes), right[STOP:]):
        return "it reads other rows: is a number of ranks, or of micro-steps, a constant?"
    if len({steps_of(rank)[0]["rng"][0] for rank in notes}) < MORE_RANKS:
        return (
            "some ranks draw the same random numbers: the saved ones belong to others, so make new "
            "ones, torch.manual_seed(args.seed + rank + ...)."
        )
    for step in range(STOP + 1, END + 1):
        if not all(near(mine[step][key], curve[step][key]) for key in ("loss", "grad_norm")):
            return f"step {step} is the first whose loss or grad_norm differs from stage 01's."
    return None


def why_not_its_gpu(ranks):
    """The (pretended) GPUs that ranks have taken. ranks: {rank: its notes}"""
    if not ranks:
        return "none: it does not come that far without other processes."
    for notes in ranks.values():
        local_rank = next((n["local_rank"] for n in notes if "local_rank" in n), 1)
        taken = {note["gpu"] for note in notes if "gpu" in note}
        if not taken:
            return (
                "none: torch.device only names one. torch.cuda.set_device(device) makes it the "
                "process's own; before init_process_group."
            )
        if taken != {local_rank}:
            places = f"local rank {local_rank} takes GPU {', '.join(map(str, sorted(taken)))}"
            return f"{places}: is it LOCAL_RANK, not the rank, nor rank % device_count?"
    return None


def why_not_numbered(ranks):
    """Stage 04, on the second of two nodes with two processes each. ranks: {rank: its notes}"""
    sizes = {
        note["world_size"] for notes in ranks.values() for note in notes if "local_rank" in note
    }
    if not sizes:
        return "none of its processes reaches init_process_group."
    if sizes != {4}:
        size = ", ".join(map(str, sorted(sizes)))
        return f"the world size is {size}: number of nodes x processes of a node."
    if sorted(ranks) != [2, 3]:
        found = " and ".join(map(str, sorted(ranks)))
        return f"they are {found}: rank = node rank x processes of a node + local rank."
    return None


def near(a, b, share=1e-3):
    return abs(a - b) <= share * abs(b)


def same_rows(one, other):
    return [sorted(rows) for rows in one] == [sorted(rows) for rows in other]


def rows_of(ranks, per_step=None):
    """Return a list of rows for each step, from what one or all ranks have noted."""
    per_rank = (per_step or GLOBAL_BATCH // len(ranks)) or 1
    rows = [rows_read(rank) for rank in ranks]
    steps = min(map(len, rows)) // per_rank
    return [
        sum((rank[step * per_rank : (step + 1) * per_rank] for rank in rows), [])
        for step in range(steps)
    ]


def steps_of(notes):
    """Return what a rank has noted before each step of the optimizer."""
    return [note for note in notes if "step" in note]


def is_sharded(notes):
    """Are the optimizer's parameters parts?"""
    return steps_of(notes[0])[0]["parts"] > 0


def until_first_step(notes):
    return notes[: notes.index(steps_of(notes)[0]) + 1]


def summary(notes):
    """Return the digests of the gradients when they were last clipped, and at the step."""
    clipped = [note["grads"] for note in notes if note.get("call") == "clip"]
    return {"step": notes[-1]["step"], "clip": (clipped or [notes[-1]["step"]])[-1]}


def tail(output):
    """Return the lines that name an error; without any, the last ones."""
    lines = [re.sub(r"^E\d{4} \S+ +\d+ \S+\] ?", "", x).strip() for x in output.splitlines()]
    errors = [line for line in lines if re.search(r"(Error|error|Exception): .", line)]
    errors = list(dict.fromkeys(errors))  # each rank's, once
    return "\n".join(f"         | {line}" for line in errors[:5] or lines[-10:] or ["nothing"])
