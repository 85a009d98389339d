"""Check a stage that you have written yourself: python tests/check_exercise.py 02 my_train_llm.py

Runs it as its stage is run, with the flags of the stages and a small model, beside stage 01, whose
losses and rows are the right ones. Says what holds, what does not, and the likely mistake. The
exit status is 0 if all holds. Takes a minute on two cores, without GPU or network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hosts import Hosts, why_not
from material import make_model, source_code
from stages import FOLDERS, ROOT, command, metrics, notes_of, recorded, rows_read

MICRO_STEPS, MICRO_BATCH, GLOBAL_BATCH = 2, 2, 8
STOP, END = 8, 16  # the first run dies at step 8, the second goes on; an epoch has 6 steps
ALL = 10  # things that should hold
SECONDS = 180  # for a run that takes ten


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["02", "03", "04"], help="what the script is meant to be")
    parser.add_argument("script", type=Path, help="your script")
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"{args.script}: no such file")
    if args.stage == "03" and (reason := why_not()):
        print(f"on one host only: {reason}")
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        folder = Path(folder)
        os.environ |= {"TEST_HOME": str(folder), "HF_HOME": str(folder / "huggingface")}
        flags = prepare(folder)
        right = reference(flags, folder)
        results = list(check(args.stage, args.script.resolve(), flags, right, folder))
    for what, mistake in results:
        print(f"  WRONG  {what}\n         {mistake}" if mistake else f"  holds  {what}")
    wrong = sum(bool(mistake) for _, mistake in results)
    if wrong:
        rest = "" if len(results) == ALL else "; the rest was not tried"
        print(f"{wrong} of {len(results)} do not hold{rest}")
    else:
        print(f"all {len(results)} hold")
    sys.exit(1 if wrong else 0)


def prepare(folder):
    """Make a model without dropout and 54 rows to train on; return the flags of the run."""
    model = make_model(folder / "model", dropout=0.0)
    data = folder / "corpus.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in source_code(4)))
    flags = ["-m", model, "-d", data, "--global-batch-size", GLOBAL_BATCH, "--max-steps", END]
    flags += ["--log-freq", 1, "--ckpt-freq", STOP, "--warmup-steps", 4, "--lr", 0.01]
    return [*flags, "--save-dir", folder / "outputs"]


def reference(flags, folder):
    """Return the metrics of stage 01's run, and its rows, a list for each step."""
    line = command("01", *flags, "-b", GLOBAL_BATCH, "-e", "reference")
    env = recorded(folder / "reference", ALONE=1)
    subprocess.run(line, env=env, check=True, capture_output=True)
    (notes,) = notes_of(folder / "reference", 1)
    return metrics(folder / "outputs" / "reference"), rows_of([notes])


def check(stage, script, flags, right, folder):
    """Yield (what should hold, what is wrong or None); stop where the rest would only follow."""
    wrong = False
    for what, mistake in check_first_run(stage, script, flags, right, folder):
        wrong = wrong or mistake
        yield what, mistake
    if not wrong:
        yield from check_second_run(stage, script, flags, right, folder)


def check_first_run(stage, script, flags, right, folder):
    """Two processes, of which rank 0 is killed at its first checkpoint."""
    curve, rows = right
    flags = [*flags, "-b", MICRO_BATCH, "-e", "run"]

    code, output, left = run(stage, script, flags, folder, "first", DIE=1)
    notes, mine = notes_of(folder / "first", 2), metrics_of(folder)
    trains = f"it trains, with two processes, and logs {STOP} steps"
    if len(mine) < STOP:
        yield trains, f"only {len(mine)} are in metrics.jsonl. It said:\n{tail(output)}"
        return
    yield trains, None
    if mine[0].get("world_size") != 2:
        yield "the processes are one training", "metrics.jsonl says world_size is not 2"
    yield "a killed rank ends the whole run", why_it_goes_on(code, left)
    if len(mine) != len({row["step"] for row in mine}):
        yield "each step is logged once", "every rank writes metrics.jsonl: only rank 0 should"
        mine = list({row["step"]: row for row in mine}.values())
    run_dir = str(folder / "outputs" / "run")
    saving = sum(any(run_dir in note.get("save", "") for note in rank) for rank in notes)
    wrong = f"{saving} ranks do: they overwrite each other's file. Save if rank == 0."
    yield "one rank writes the checkpoint", None if saving == 1 else wrong
    wrong = why_not_the_rows(rows[:STOP], notes)
    yield "the ranks share out the rows that stage 01 reads at each step", wrong
    if wrong:
        return
    wrong = why_not_the_curve(curve, mine[:STOP])
    yield "the losses are those of stage 01", wrong
    if wrong:
        return

    yield from check_device(stage, script, flags, folder)


def check_second_run(stage, script, flags, right, folder):
    """The same again, which goes on from the checkpoint."""
    curve, rows = right
    flags = [*flags, "-b", MICRO_BATCH, "-e", "run"]
    code, output, left = run(stage, script, flags, folder, "second")
    mine = {row["step"]: row for row in metrics_of(folder)}
    goes_on = f"it goes on from the checkpoint, to step {END}"
    if code != 0 or END not in mine:
        yield goes_on, f"exit status {code}, last step {max(mine)}. It said:\n{tail(output)}"
        return
    yield goes_on, None
    yield "no process is left behind", f"{left} are" if left else None
    resumed = rows_of(notes_of(folder / "second", 2))
    if same_rows(resumed, rows[STOP:]):
        wrong = None
    elif not resumed or sorted(resumed[0]) in map(sorted, rows[:STOP]):
        wrong = (
            "it reads rows again that it has had: step x global batch says which epoch it is and "
            "where in it to go on."
        )
    else:
        wrong = "it reads other rows: are the epoch, and the position in it, restored?"
    yield "after a resume it reads the rows that come next", wrong
    if wrong:
        return
    yield (
        "after a resume the losses are those of a run that was never stopped",
        why_not_resumed(curve, [mine[step] for step in range(STOP + 1, END + 1)]),
    )


def check_device(stage, script, flags, folder):
    """Yield whether each rank takes the GPU of its local rank; the GPUs are pretended."""
    env, gpus = {"GPUS": 3 if stage == "03" else 2}, {}
    if stage == "04":
        run(stage, script, flags, folder, "gpus", **env)
        gpus = dict(enumerate(notes_of(folder / "gpus", 2)))
    else:  # one process is enough: the second one, of the second node where there are nodes
        rank, size = (3, 4) if stage == "03" else (1, 2)
        env |= {"RANK": rank, "LOCAL_RANK": 1, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": 2}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_RANK": rank // 2}
        line = [sys.executable, script, *map(str, flags)]
        env = recorded(folder / "gpus", **env)
        subprocess.run(line, env=env, capture_output=True, timeout=SECONDS)
        gpus = {1: notes_of(folder / "gpus", rank + 1)[rank]}
    what = "each rank takes the GPU of its local rank"
    for local_rank, notes in gpus.items():
        taken = {note["gpu"] for note in notes if "gpu" in note}
        if not taken:
            yield what, "none: torch.cuda.set_device(local_rank) before init_process_group."
            return
        if taken != {local_rank}:
            places = f"local rank {local_rank} takes GPU {', '.join(map(str, sorted(taken)))}"
            yield what, f"{places}: is it LOCAL_RANK, not the rank, nor rank % device_count?"
            return
    yield what, None


def why_it_goes_on(code, left):
    if code is None:
        return f"the others still ran after {SECONDS} s: what are they waiting for?"
    if left:
        return f"{left} processes were left behind"
    if code == 0:
        return "the exit status was 0: a scheduler would take it for a success"
    return None


def why_not_the_rows(right, notes):
    """Return what is wrong with the rows that the ranks read, against stage 01's, or None."""
    if not all(notes):
        return "one rank reads nothing"
    mine = rows_of(notes)
    if same_rows(mine, right):
        return None
    ranks = [rows_of([rank], GLOBAL_BATCH // 2) for rank in notes]
    if all(one == other for one, other in zip(*ranks, strict=False)):  # up to where one died
        return "every rank reads the same data: a DistributedSampler is missing, or not used."
    epoch = len(right) - STOP % 6  # 6 steps
    if same_rows(mine[:epoch], right[:epoch]):
        if mine[epoch] == mine[0]:
            return "the order of the second epoch is that of the first: sampler.set_epoch(epoch)."
        return "the second epoch is wrong, the first is right: does the sampler know the epoch?"
    if sorted(sum(mine[:epoch], [])) == sorted(sum(right[:epoch], [])):
        return "the rows are right, but in another order: another seed, or another interleaving?"
    return "the ranks do not read the rows of stage 01: seed, drop_last, and who takes which?"


def why_not_the_curve(curve, mine):
    """Return what is wrong with the metrics of the first steps, or None."""
    (right, first), last = (curve[1], mine[0]), mine[-1]
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
        if near(norm, 2) or near(norm, 0.5):
            return (
                f"the loss is right, the gradients are {norm:.2g} times what they should be: they "
                "must be averaged over the ranks, and the loss divided by the micro-batches."
            )
        return (
            "the loss of step 1 is right, its gradients are not: they are not averaged over the "
            "ranks. Does the training call DDP's model, and backward() of the last micro-batch "
            "stand outside no_sync()?"
        )
    for row in mine:
        if not near(row["lr"], curve[row["step"]]["lr"]):
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
    if "val_loss" in last and not near(last["val_loss"], curve[last["step"]]["val_loss"]):
        return "val_loss is wrong: each rank has seen a part only; all_reduce the sum, then divide."
    return None


def why_not_resumed(curve, mine):
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


def near(a, b):
    return abs(a - b) <= 1e-3 * abs(b)


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


def metrics_of(folder):
    path = folder / "outputs" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(stage, script, flags, folder, name, **env):
    """Run the script on two processes, of stage 03 on two hosts.

    Return exit status (None: it had to be ended), output and number of processes left behind.
    """
    env = recorded(folder / name, **env)
    path = folder / f"{name}.txt"
    hosts = Hosts(folder / name) if stage == "03" and not why_not() else None
    started = []
    with open(path, "w") as output:
        if hosts:
            hosts("up")
            started = hosts.both(*flags, script=script, **env)
        else:
            stages_own = str(ROOT / FOLDERS[stage] / "train_llm.py")
            line = command(stage, *flags, processes=2)
            line[line.index(stages_own)] = str(script)
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            started = [subprocess.Popen(line, env=env, **options)]
        end = time.monotonic() + SECONDS
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            time.sleep(0.05)
        codes = [process.poll() for process in started]
        time.sleep(0.5)
        left = processes_with(f"RECORD={folder / name}")
        for pid in left:
            os.kill(pid, 9)
        if hosts:
            output.write("".join(process.output.read_text() for process in started))
            hosts.down()
    code = None if None in codes else max(map(abs, codes))
    return code, path.read_text(), len(left)


def processes_with(variable):
    """Return the ids of the processes that have NAME=VALUE in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def tail(output):
    """Return the lines that name an error; without any, the last ones."""
    lines = output.splitlines()
    errors = [line for line in lines if re.search(r"(Error|error|Exception): ", line)]
    return "\n".join(f"         | {line}" for line in errors[:5] or lines[-10:] or ["nothing"])


if __name__ == "__main__":
    main()
