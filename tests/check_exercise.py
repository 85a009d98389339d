"""Check a stage that you have written yourself: python tests/check_exercise.py 02 my_train_llm.py

Runs it as its stage is run, with the flags of the stages and a small model, beside stage 01, whose
losses and rows are the right ones. Says what holds, what does not, and the likely mistake. The
exit status is 0 if all holds. Takes a minute on two idle cores, without GPU or network.

02, 03, 04: the script is that stage. ddp: stage 02 with an averaging of your own instead of DDP.
sharded: stage 03 with fully_shard. tp: stage 02 with layers that the ranks share, instead of DDP.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from checker import mistakes
from checker.mistakes import END, GLOBAL_BATCH, MICRO_BATCH, RANKS, STOP
from lab.hosts import Hosts, why_not
from lab.material import make_model, make_of_kind, source_code
from lab.stages import (
    FOLDERS,
    ROOT,
    command,
    fork,
    metrics,
    notes_of,
    processes_with,
    recorded,
    run_forked,
)

ALIKE = {"ddp": "02", "sharded": "03", "tp": "02"}  # whose command line and devices they have
ALL = {"02": 15, "03": 15, "04": 15, "ddp": 16, "sharded": 15, "tp": 8}  # things that should hold


def main():
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    parser.add_argument("stage", choices=list(ALL), help="what the script is meant to be")
    parser.add_argument("script", type=Path, help="your script")
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"{args.script}: no such file")
    if ALIKE.get(args.stage, args.stage) == "03" and (reason := why_not()):
        print(f"on one host only: {reason}")
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        os.environ |= {"TEST_HOME": folder, "HF_HOME": f"{folder}/huggingface", "TMPDIR": folder}
        tempfile.tempdir = folder  # also of what torch itself makes
        say("  ...    stage 01, whose losses and rows are the right ones")
        right = Reference(Path(folder), args.stage)
        wrong = held = 0
        for what, mistake in Check(args.stage, args.script, right, Path(folder)).all():
            say(f"  WRONG  {what}\n         {mistake}" if mistake else f"  holds  {what}")
            wrong, held = wrong + bool(mistake), held + (not mistake)
    if wrong:
        more = ALL[args.stage] - wrong - held
        rest = f"; {more} more were not tried" if more > 0 else ""
        print(f"{wrong} of {wrong + held} do not hold{rest}")
    else:
        print(f"all {held} hold")
    sys.exit(1 if wrong else 0)


say = partial(print, flush=True)


class Reference:
    """A small model, some rows to train on, and what stage 01 does with them.

    forked: runs skip the import of the libraries, as the project's own tests do.
    """

    def __init__(self, folder, stage="02", forked=False):
        self.forked = forked
        data = folder / "corpus.jsonl"
        # So few that an epoch ends early; for sharded so many that the ranks have different numbers
        # of validation batches (9 rows).
        documents = 58 if stage == "sharded" else 4
        data.write_text("\n".join(json.dumps({"text": text}) for text in source_code(documents)))
        self.flags = ["-m", make_model(folder / "model", dropout=0.0)]
        if stage == "tp":
            heads = {"num_key_value_heads": 2, "tie_word_embeddings": True}
            self.flags = make_of_kind(folder / "llama", "llama", **heads)
        self.flags += ["-d", data, "--global-batch-size", GLOBAL_BATCH]
        self.flags += ["--max-steps", END, "--warmup-steps", 4, "--lr", 0.01]
        self.flags += ["--log-freq", 1, "--ckpt-freq", STOP]
        line = command("01", *self.flags, "-b", GLOBAL_BATCH, "-e", "reference")
        line += ["--save-dir", str(folder)]
        env, began = recorded(folder / "reference-notes", ALONE=1), time.monotonic()
        if forked:
            run_forked(line[1:], 180, env).check_returncode()
        else:
            subprocess.run(line, env=env, check=True, capture_output=True)
        seconds = time.monotonic() - began
        # How long a run of two processes may take, and how long a rank may be silent before it
        # counts as hanging. Ample: the machine may be busier by then.
        self.limit, self.quiet = max(90, 12 * seconds), max(20, 2 * seconds)
        self.curve = metrics(folder / "reference")
        self.checkpoint = folder / "reference" / "checkpoint.pt"
        self.rows = mistakes.rows_of(notes_of(folder / "reference-notes", 1))
        self.parameters = len(torch.load(self.checkpoint)["optimizer"]["state"])


class Check:
    """The check of one script. folder: for all that its runs write."""

    def __init__(self, stage, script, right, folder):
        self.stage, self.alike = stage, ALIKE.get(stage, stage)
        self.script, self.right, self.folder = script.resolve(), right, folder
        self.run_dir = folder / "outputs" / "run"
        self.flags = [*right.flags, "-b", MICRO_BATCH, "-e", "run"]
        self.flags += ["--save-dir", folder / "outputs"]

    def all(self):
        """Yield (what should hold, what is wrong or None), up to the run in which one is wrong."""
        wrong = False
        runs = (self.first_run, self.device, self.second_run)
        for part in runs[:2] if self.stage == "tp" else runs:  # it does not go on
            for what, mistake in part():
                wrong = wrong or mistake
                yield what, mistake
            if wrong:
                return

    def first_run(self):
        """Two processes, of which rank 0 is killed at its first checkpoint."""
        say(f"  ...    your script, until rank 0 is killed after step {STOP}")
        code, output, left, notes, stacks = self.run("first", DIE=1)
        self.first, mine = notes, self.metrics()
        trains = f"it trains, with two processes, and logs {STOP} steps"
        if len(mine) < STOP:
            why = mistakes.why_it_stopped(notes, stacks, self.script, output)
            yield trains, f"only {len(mine)} are in metrics.jsonl: {why}"
            return
        yield trains, None
        if mine[0].get("world_size") != RANKS:
            yield "the processes are one training", "metrics.jsonl says world_size is not 2"
        if wrong := mistakes.why_none_writes(notes, self.run_dir):  # then none was killed either
            yield "one rank writes the checkpoint", wrong
            return
        wrong = mistakes.why_it_goes_on(code, left, self.right.limit)
        yield "a killed rank ends the whole run", wrong
        if len(mine) != len({row["step"] for row in mine}):
            yield "each step is logged once", "every rank writes metrics.jsonl: only rank 0 should"
            mine = list({row["step"]: row for row in mine}.values())
        yield "one rank writes the checkpoint", mistakes.why_not_one_writes(notes, self.run_dir)
        yield "the rows are made once, by rank 0", mistakes.why_not_made_once(notes)
        if self.stage == "tp":
            yield from self.shared_layers(mine, notes)
            return
        wrong = mistakes.why_not_the_rows(self.right.rows[:STOP], notes)
        yield "the ranks share out the rows that stage 01 reads at each step", wrong
        if wrong:
            return
        if self.stage == "sharded":
            wrong = mistakes.why_not_sharded(notes)
            yield "each rank keeps a part of every parameter, block by block", wrong
        wrong = wrong or mistakes.why_not_the_curve(self.right.curve, mine[:STOP], notes)
        yield "the losses are those of stage 01", wrong
        if wrong:
            return
        if self.stage != "sharded":
            yield "weights and gradients are equal on all ranks", mistakes.why_not_equal(notes)
        if self.stage == "ddp":
            wrong = mistakes.why_no_overlap(notes)
            yield "the first all-reduce starts before backward() ends", wrong
        wrong = mistakes.why_not_other_numbers(notes)
        yield "each rank draws random numbers of its own, for dropout", wrong
        path = self.run_dir / "checkpoint.pt"
        wrong = mistakes.why_not_interchangeable(path, self.right.checkpoint)
        yield "the checkpoint is one that stage 01 could load", wrong

    def shared_layers(self, mine, notes):
        """Yield what holds of tensor parallelism."""
        wrong = mistakes.why_not_the_same_rows(self.right.rows[:STOP], notes)
        yield "each rank reads the rows that stage 01 reads at each step", wrong
        if wrong:
            return
        right = self.right.curve, mine[:STOP], notes, self.right.parameters
        wrong = mistakes.why_not_shared(*right)
        yield "losses and norms are those of stage 01; what is whole is equal on all ranks", wrong
        if not wrong:
            wrong = mistakes.why_other_numbers(notes)
            yield "the ranks draw the same random numbers, for dropout", wrong

    def device(self):
        """Yield whether each rank takes the GPU of its local rank; the GPUs are pretended."""
        say("  ...    your script, up to where it takes a GPU (pretended)")
        env, gpus = {"GPUS": 3 if self.alike == "03" else 2}, {}
        if self.stage == "04":
            gpus = dict(enumerate(self.run("gpus", **env)[3]))
        else:  # one process is enough: the second one, of the second node where there are nodes
            rank, size = (3, 4) if self.alike == "03" else (1, 2)
            env |= {"RANK": rank, "LOCAL_RANK": 1, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": 2}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_RANK": rank // 2}
            env, line = recorded(self.folder / "gpus", **env), [self.script, *self.flags]
            if self.right.forked:
                run_forked(list(map(str, line)), self.right.limit, env)
            else:
                line = [sys.executable, *map(str, line)]
                with suppress(subprocess.TimeoutExpired):  # it has taken none
                    subprocess.run(line, env=env, capture_output=True, timeout=self.right.limit)
            gpus = {1: notes_of(self.folder / "gpus", rank + 1)[rank]}
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

    def second_run(self):
        """The same again, which goes on from the checkpoint."""
        say("  ...    your script again, from its checkpoint")
        code, output, left, notes, stacks = self.run("second")
        mine = {row["step"]: row for row in self.metrics()}
        goes_on = f"it goes on from the checkpoint, to step {END}"
        wrong = mistakes.why_not_from_the_checkpoint(self.first, notes)
        if code != 0 or END not in mine or wrong:
            wrong = wrong or mistakes.why_it_stopped(notes, stacks, self.script, output)
            yield goes_on, f"exit status {code}, last step {max(mine)}: {wrong}"
            return
        yield goes_on, None
        yield "no process is left behind", f"{left} are" if left else None
        wrong = mistakes.why_not_the_next_rows(self.right.rows, notes)
        yield "after a resume it reads the rows that come next", wrong
        if wrong:
            return
        mine = [mine[step] for step in range(STOP + 1, END + 1)]
        wrong = mistakes.why_not_resumed(self.right.curve, mine, notes)
        yield "after a resume the losses are those of a run that was never stopped", wrong
        wrong = mistakes.why_not_its_own_numbers(self.first, notes)
        yield "after a resume each rank takes back its own random state", wrong

    def metrics(self):
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, name, **env):
        """Run the script on two processes, of stage 03 on two hosts.

        Return the exit status (None: it had to be ended), the output, the number of processes left
        behind, the ranks' notes, and if the run hangs, where each rank is.
        """
        folder, forked = self.folder / name, self.right.forked and self.alike != "04"
        env = recorded(folder, QUIET=self.right.quiet, **env)
        hosts = Hosts(folder, forked) if self.alike == "03" and not why_not() else None
        output = folder / "output.txt"
        if hosts:
            hosts("up")
            started = hosts.both(*self.flags, script=self.script, **env)
        else:
            stages_own = str(ROOT / FOLDERS[self.alike] / "train_llm.py")
            line = command(self.alike, *self.flags, processes=RANKS)
            line[line.index(stages_own)] = str(self.script)
            if forked:
                started = [fork(line[1:], (output, output), env)]
            else:
                with open(output, "w") as file:
                    options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
                    started = [subprocess.Popen(line, env=env, **options)]
        end, stacks, log = time.monotonic() + self.right.limit, [], self.run_dir / "metrics.jsonl"
        while None in [status(process) for process in started] and time.monotonic() < end:
            time.sleep(0.05)
            if log.exists() and log.read_bytes().count(b"\n") > RANKS * END:
                break  # it trains on and on
            paths = [folder / f"{rank}.stack" for rank in range(RANKS)]
            found = [path.read_text() if path.exists() else "" for path in paths]
            if any(found) and not stacks:
                end = time.monotonic() + 2  # for the others to say where they are
            stacks = found if any(found) else []
        codes = [status(process) for process in started]
        time.sleep(0.5)
        rest = left = processes_of(folder)
        while rest:
            for pid in rest:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
            rest = processes_of(folder)
        if hosts:
            output.write_text("".join(process.output.read_text() for process in started))
            hosts.down()
        code = None if None in codes else max(map(abs, codes))
        text = output.read_text() if output.exists() else ""
        return code, text, len(left), notes_of(folder, RANKS), stacks


def status(process):
    """Return a process's exit status, or None; forked ones are no subprocess.Popen."""
    return process.poll() if hasattr(process, "poll") else process.exitcode


def processes_of(folder):
    """Return the ids of the processes that were told to note in folder, or have its output open.

    The second because a forked process still shows the environment of what it was forked from.
    """
    found = set(processes_with(f"RECORD={folder}"))
    outputs = {str(path) for path in (folder / "output.txt", *folder.glob("node*.log"))}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) in outputs:
                found.add(int(link.parts[2]))
    return found - {os.getpid()}


if __name__ == "__main__":
    main()
