"""Check a stage that you have written yourself: python tests/check_exercise.py 02 my_multi_gpu.py

Runs it as its stage is run, with the flags of the stages and a small model, beside stage 01, whose
losses and rows are the right ones. Says what holds, what does not, and the likely mistake. Of
several scripts, one after the other, it ends with a table. The exit status is 0 if all holds.
Takes half a minute on two idle cores, on busy ones two, without GPU or network.

02, 03, 04: the script is that stage. ddp: stage 02 with an averaging of your own instead of DDP.
sharded: stage 03 with fully_shard. tp: stage 02 with layers that the ranks share, instead of DDP.
"""

import argparse
import json
import os
import shutil
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
from checker.mistakes import END, GLOBAL_BATCH, MICRO_BATCH, MORE_RANKS, RANKS, SEED, STOP, But
from lab.hosts import Hosts, why_not
from lab.material import make_model, make_of_kind, source_code
from lab.stages import (
    FOLDERS,
    ROOT,
    command,
    environment,
    fork,
    metrics,
    notes_of,
    processes_with,
    recorded,
    run_forked,
)
from transformers import AutoModelForCausalLM

ALIKE = {"ddp": "02", "sharded": "03", "tp": "02"}  # whose command line and devices they have
ALL = {"02": 17, "03": 17, "04": 18, "ddp": 19, "sharded": 17, "tp": 8}  # things that should hold


def main():
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    parser.add_argument("stage", choices=list(ALL), help="what the script is meant to be")
    parser.add_argument("scripts", type=Path, nargs="+", metavar="script", help="yours")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, at the end")
    args = parser.parse_args()
    say = partial(print, flush=True, file=sys.stderr if args.json else sys.stdout)
    for script in args.scripts:
        if not script.is_file():
            parser.error(f"{script}: no such file")
    if ALIKE.get(args.stage, args.stage) in ("03", "04") and (reason := why_not()):
        say(f"on one host only: {reason}")
    checked = []
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        os.environ |= {"TEST_HOME": folder, "HF_HOME": f"{folder}/huggingface", "TMPDIR": folder}
        os.environ |= environment()  # also of the process that the others are forked from
        say("  ...    stage 01, whose losses and rows are the right ones")
        right = Reference(Path(folder), args.stage, forked=sys.platform == "linux")
        for number, script in enumerate(args.scripts):
            if len(args.scripts) > 1:
                say(f"{script}")
            place = Path(folder, f"script{number}")
            place.mkdir()
            checked.append(check(args.stage, script, right, place, say))
            shutil.rmtree(place)
    if args.json:
        print(json.dumps(checked, indent=2))
    elif len(checked) > 1:
        width = max(len(one["script"]) for one in checked)
        for one in checked:
            first = next((part for part in one["parts"] if part["is"] == "WRONG"), None)
            print(f"{one['script']:{width}}  {one['in short']}", end="")
            print(f": {first['what']}" if first else "")
    sys.exit(0 if all(one["all hold"] for one in checked) else 1)


def check(stage, script, right, folder, say):
    """Check one script, and say so. Return what was found, as --json prints it."""
    parts = []
    for what, mistake in Check(stage, script, right, folder, say).all():
        kind = "WRONG" if mistake and not isinstance(mistake, But) else "holds"
        more = f"\n         {'but ' if kind == 'holds' else ''}{mistake}" if mistake else ""
        say(f"  {kind}  {what}{more}")
        parts.append({"is": kind, "what": what, "why": mistake})
    wrong = [part["what"] for part in parts if part["is"] == "WRONG"]
    more = ALL[stage] - len(parts)
    text = f"all {len(parts)} hold"
    if wrong:
        rest = f"; {more} more were not tried" if more > 0 else ""
        text = f"{len(wrong)} of {len(parts)} do not hold{rest}"
        if wrong == [Check.OVERLAP]:
            text = f"the first part holds, all {len(parts) - 1}; the second asks for overlap"
    say(text)
    return {"script": str(script), "all hold": not wrong, "in short": text, "parts": parts}


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
            more = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
            more["tie_word_embeddings"] = True
            self.flags = make_of_kind(folder / "llama", "llama", **more)
        self.flags += ["-d", data, "--seed", SEED]
        self.flags += ["--max-steps", END, "--warmup-steps", 4, "--lr", 0.01]
        self.flags += ["--log-freq", 1, "--ckpt-freq", STOP]
        self.global_batch = ["--global-batch-size", GLOBAL_BATCH]
        self.folder, began = folder, time.monotonic()
        self.curve = self.train("reference")
        seconds = time.monotonic() - began
        # How long a run of two processes may take, and how long a rank may be silent before it
        # counts as hanging. Ample: the machine may be busier by then.
        self.limit, self.quiet = max(90, 12 * seconds), max(20, 2 * seconds)
        self.checkpoint = folder / "reference" / "checkpoint.pt"
        self.rows = mistakes.rows_of(notes_of(folder / "reference-notes", 1))
        self.parameters = len(torch.load(self.checkpoint)["optimizer"]["state"])

    def train(self, name, *flags):
        """Run stage 01; return its metrics."""
        line = command("01", *self.flags, "-b", GLOBAL_BATCH, *flags, "-e", name)
        line += ["--save-dir", str(self.folder)]
        env = recorded(self.folder / f"{name}-notes", ALONE=1)
        self.python(line[1:], 180, env).check_returncode()
        return metrics(self.folder / name)

    def python(self, words, seconds, env):
        """Do `python WORDS` to its end; return the finished process."""
        if self.forked:
            return run_forked(words, seconds, env)
        line = [sys.executable, *words]
        return subprocess.run(line, env=env, capture_output=True, timeout=seconds)

    def loss_with_biases_of_all(self):
        """Return the first loss if each rank adds the biases of what ends in an all-reduce."""
        shutil.copytree(self.folder / "llama", self.folder / "biases", dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(self.folder / "llama")
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter.data *= RANKS
        model.save_pretrained(self.folder / "biases")
        return self.train("with-biases", "-m", self.folder / "biases")[1]["loss"]


class Check:
    """The check of one script. folder: for all that its runs write. say: shows what it is at."""

    OVERLAP = "the first all-reduce starts before backward() ends"

    def __init__(self, stage, script, right, folder, say=print):
        self.say = say
        self.stage, self.alike = stage, ALIKE.get(stage, stage)
        self.script, self.right, self.folder = script.resolve(), right, folder
        self.run_dir = folder / "outputs" / "run"
        self.flags = [*right.flags, "-b", MICRO_BATCH, "--save-dir", folder / "outputs"]
        self.hosts = None

    def all(self):
        """Yield (what should hold, what is wrong or None), up to the run in which one is wrong."""
        wrong = False
        runs = (self.first_run, self.device, self.second_run, self.more_ranks)
        for part in runs[:2] if self.stage == "tp" else runs:  # it does not go on
            for what, mistake in part():
                wrong = wrong or (mistake and not isinstance(mistake, But))
                yield what, mistake
            if wrong:
                return
        if self.stage == "ddp":  # last: the second part of its exercise
            yield self.OVERLAP, mistakes.why_no_overlap(self.first)

    def first_run(self):
        """Two processes, of which rank 0 is killed at its first checkpoint."""
        self.say(f"  ...    your script, until rank 0 is killed after step {STOP}")
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
            if wrong:
                return
        wrong = mistakes.why_not_the_curve(self.right.curve, mine[:STOP], notes)
        yield "the losses are those of stage 01", wrong
        if wrong:
            return
        if self.stage != "sharded":
            yield "weights and gradients are equal on all ranks", mistakes.why_not_equal(notes)
        if self.stage == "ddp":
            yield "the averaging is your own", mistakes.why_not_your_own(notes)
        wrong = mistakes.why_not_other_numbers(notes)
        yield "each rank draws random numbers of its own, for dropout", wrong
        path = self.run_dir / "checkpoint.pt"
        wrong = mistakes.why_not_interchangeable(path, self.right.checkpoint)
        yield "the checkpoint is one that stage 01 could load", wrong
        yield "no two ranks share a wandb run", mistakes.why_not_a_run_each(notes)
        shutil.copytree(self.run_dir, self.run_dir.with_name("more"))

    def shared_layers(self, mine, notes):
        """Yield what holds of tensor parallelism."""
        wrong = mistakes.why_not_the_same_rows(self.right.rows[:STOP], notes)
        yield "each rank reads the rows that stage 01 reads at each step", wrong
        if wrong:
            return
        wrong = mistakes.why_not_shared(self.right, mine[:STOP], notes)
        yield "losses and norms are those of stage 01; what is whole is equal on all ranks", wrong
        if not wrong:
            wrong = mistakes.why_other_numbers(notes)
            yield "the ranks draw the same random numbers, for dropout", wrong

    def device(self):
        """Yield whether each rank takes the GPU of its local rank; the GPUs are simulated."""
        self.say("  ...    your script, up to where it takes a GPU (simulated)")
        folder = self.folder / "gpus"
        env = {"GPUS": 3 if self.alike == "03" else 2}
        line = [self.script, *self.flags, *self.right.global_batch]
        if self.stage == "04":  # all of the second node: it does not look for the first one
            line += ["--nnodes", 2, "--node-rank", 1, "--nproc-per-node", 2]
            line += ["--master-addr", "192.0.2.1"]
        else:  # one process is enough: the second one, of the second node where there are nodes
            rank, size = (3, 4) if self.alike == "03" else (1, 2)
            env |= {"RANK": rank, "LOCAL_RANK": 1, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": 2}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_RANK": rank // 2}
        env, line = self.recorded(folder, **env), list(map(str, line))
        with suppress(subprocess.TimeoutExpired):  # it has taken none
            self.right.python(line, self.right.limit, env)
        ranks = {rank: notes for rank, notes in enumerate(notes_of(folder, 4)) if notes}
        if self.stage == "04":
            wrong = mistakes.why_not_numbered(ranks)
            yield "the ranks of the second of two nodes are 2 and 3, of 4", wrong
            if wrong:
                return
        yield "each rank takes the GPU of its local rank", mistakes.why_not_its_gpu(ranks)

    def second_run(self):
        """The same again, which goes on from the checkpoint."""
        self.say("  ...    your script again, from its checkpoint")
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

    def more_ranks(self):
        """Again from the checkpoint of step 8, with more ranks, and with the default of a flag."""
        self.say(f"  ...    your script on {MORE_RANKS} ranks, from the checkpoint of {RANKS}")
        code, output, _, notes, stacks = self.run("more", MORE_RANKS, [], "more")
        mine = {row["step"]: row for row in self.metrics("more")}
        said = None
        if code != 0 or END not in mine:
            said = mistakes.why_it_stopped(notes, stacks, self.script, output)
        right = self.right.curve, self.right.rows
        wrong = mistakes.why_not_with_more_ranks(code, *right, mine, notes, said)
        yield f"it goes on with {MORE_RANKS} ranks", wrong

    def metrics(self, name="run"):
        path = self.run_dir.with_name(name) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def recorded(self, folder, **env):
        env = {"WANDB_MODE": "offline"} | env  # which the recorder notes, and then disables
        if self.stage != "sharded":  # fully_shard sends no weights: all ranks may make the same
            env["OTHER_WEIGHTS"] = 1
        return recorded(folder, **env, **({"FORKED": 1} if self.right.forked else {}))

    def run(self, name, ranks=RANKS, global_batch=None, experiment="run", **env):
        """Run the script on two processes (or more), of stages 03 and 04 on two hosts.

        Return the exit status (None: it had to be ended), the output, the number of processes left
        behind, the ranks' notes, and if the run hangs, where each rank is.
        """
        folder, flags = self.folder / name, [*self.flags, "-e", experiment]
        flags += self.right.global_batch if global_batch is None else global_batch
        env = self.recorded(folder, QUIET=self.right.quiet, **env)
        try:
            return self.watch(folder, self.start(folder, flags, ranks, env), ranks, experiment)
        finally:  # also after Ctrl-C
            end(folder)
            if self.hosts:
                self.hosts.down()
                self.hosts = None

    def start(self, folder, flags, ranks, env):
        """Start a run; return its processes."""
        if self.alike in ("03", "04") and not why_not():
            self.hosts = hosts = Hosts(folder, self.right.forked)
            hosts("up")
            if self.alike == "03":
                return hosts.both(*flags, script=self.script, processes=ranks // 2, **env)
            how = {"script": self.script, "processes": ranks // 2} | env
            return [hosts.spawn(f"node{n + 1}", n, *flags, **how) for n in range(2)]
        stages_own = str(ROOT / FOLDERS[self.alike] / "train_llm.py")
        line = command(self.alike, *flags, processes=ranks)
        line[line.index(stages_own)] = str(self.script)
        output = folder / "output.txt"
        if self.right.forked:
            return [fork(line[1:], (output, output), env)]
        with open(output, "w") as file:
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            return [subprocess.Popen(line, env=env, **options)]

    def watch(self, folder, started, ranks, experiment):
        """Wait for the end of a run, or until it hangs; return as `run` does."""
        output, stacks = folder / "output.txt", []
        end_time = time.monotonic() + self.right.limit
        log = self.run_dir.with_name(experiment) / "metrics.jsonl"
        while None in [status(process) for process in started] and time.monotonic() < end_time:
            time.sleep(0.05)
            if log.exists() and log.read_bytes().count(b"\n") > ranks * END:
                break  # it trains on and on
            paths = [folder / f"{rank}.stack" for rank in range(ranks)]
            found = [path.read_text() if path.exists() else "" for path in paths]
            if any(found) and not stacks:
                end_time = time.monotonic() + 2  # for the others to say where they are
            stacks = found if any(found) else []
        codes, soon = [status(process) for process in started], time.monotonic() + 0.5
        while processes_of(folder) and time.monotonic() < soon:
            time.sleep(0.05)
        left = end(folder)
        if self.hosts:
            output.write_text("".join(process.output.read_text() for process in started))
        code = None if None in codes else max(map(abs, codes))
        text = output.read_text() if output.exists() else ""
        return code, text, left, notes_of(folder, ranks), stacks


def end(folder):
    """End the processes that were told to note in folder; return how many there were."""
    left = rest = processes_of(folder)
    while rest:
        for pid in rest:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        rest = processes_of(folder)
    return len(left)


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
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
