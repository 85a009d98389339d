"""Stage 04: the same training without torchrun: this script starts its processes itself.

python train_llm.py --nproc-per-node 2 --max-steps 200

README.md beside this file has the lines for GPUs, for other models and data, and for clusters.
"""

import argparse
import hashlib
import ipaddress
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import sysconfig
import threading
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import dill
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import wandb
from datasets import Features, List, Value, disable_progress_bars, load_dataset
from huggingface_hub import constants, get_session, is_offline_mode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers import logging as transformers_logging
from transformers.integrations.sdpa_attention import sdpa_attention_forward

log = logging.getLogger("train_llm")

# A run may go on from a checkpoint only if these are what they were when it was written.
TRAINING_FLAGS = ["model_name", "pretrained", "dataset_name", "dataset_subset", "seq_length"]
TRAINING_FLAGS += ["global_batch_size", "seed", "lr", "warmup_steps", "dtype"]

# Launchers that start this script once per node, the innermost first, and where each says: which
# process this is, how many there are, and which one it is on its node (there must be only one).
LAUNCHERS = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI and their relatives
    ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_LOCALID"),
    ("PBS_NODENUM", "PBS_NODEFILE", ""),  # the file names the hosts, some of them repeatedly
]


@logging_redirect_tqdm()  # log lines appear above the progress bar instead of inside it
def main(args):
    # Device and precision. The weights are float32 everywhere: autocast only runs the matrix
    # products in bf16. Pure bf16 weights would stop moving where a step is below their rounding.
    on_gpu = torch.cuda.is_available()
    rank, world_size = start_process_group(on_gpu, args.timeout)
    check_agreement(what_must_be_equal(args), only_warn=["python", "datasets", "wandb"])
    device = torch.device("cuda" if on_gpu else "cpu")
    fast_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bf16" if fast_bf16 else "fp32")
    args.compile = on_gpu if args.compile is None else args.compile
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    # Batches. The global batch decides the loss curve; the micro-batch only has to fit in memory.
    args.global_batch_size = args.global_batch_size or args.batch_size * world_size
    micro_steps, rest = divmod(args.global_batch_size, args.batch_size * world_size)
    if rest:
        sys.exit(
            f"error: --global-batch-size {args.global_batch_size} is not a multiple of "
            f"--batch-size {args.batch_size} x {world_size} processes"
        )

    # Data: rows of seq_length tokens, the same rows in every stage.
    # Rank 0 makes them while the others ask at the store: a collective would time out.
    store = dist.group.WORLD.get_group_store()
    while rank > 0 and not store.check(["data is ready"]):
        time.sleep(0.5)
    tokenizer, config = load_tokenizer_and_config(args)
    train_data, val_data, data_id = load_data(args, tokenizer)
    store.set("data is ready", "")
    if args.prepare_only:
        build_model(args, config)  # with --pretrained this downloads the weights
        log.info("everything is in the cache: run again without --prepare-only")
        end_process_group()  # the store may end with rank 0 while others still ask it: wait
        return
    epoch_steps = len(train_data) // args.global_batch_size
    epoch_samples = epoch_steps * args.global_batch_size
    total_steps = args.max_steps or (args.num_epochs * epoch_steps if args.num_epochs else 1200)
    if args.num_epochs:
        total_steps = min(total_steps, args.num_epochs * epoch_steps)

    # Model, optimizer, schedule. The seed decides the initial weights, and then the dropout.
    torch.manual_seed(args.seed)
    model = build_model(args, config).to(device).train()
    if rank > 0:
        torch.manual_seed(args.seed + rank)  # the weights are made: let dropout differ by rank
    # DDP inside, compile outside: the compiler then cuts its graph where DDP's buckets end, so
    # that the all-reduce of one bucket overlaps with computing the gradients of the next.
    ddp_model = DDP(model, gradient_as_bucket_view=True)  # views: no copies around all-reduce
    training_model = torch.compile(ddp_model) if args.compile else ddp_model
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, args.warmup_steps, total_steps, min_lr_rate=0.1
    )
    log.info(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.dtype} on {device}; "
        f"data: {data_id}; {total_steps} steps of {args.global_batch_size} x {args.seq_length} "
        f"tokens, {micro_steps} micro-batches each"
    )

    # Resume: whatever the next step depends on comes back.
    step = samples_seen = 0
    run_dir, shared = open_run_dir(args)
    flags = {f"--{name.replace('_', '-')}": getattr(args, name) for name in TRAINING_FLAGS}
    flags["the data"] = data_id
    if run_dir and (run_dir / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(run_dir / "checkpoint.pt", flags, model)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        step, samples_seen = checkpoint["step"], checkpoint["samples_seen"]
        if len(checkpoint["rng"]) == world_size:
            set_rng_state(checkpoint["rng"][rank], device)
        else:  # the same loss curve, but dropout has to draw anew
            torch.manual_seed(args.seed + rank + world_size * step)
        if step >= total_steps:
            log.info(
                f"already finished at step {step}: to go on, raise --max-steps or --num-epochs"
            )
        elif checkpoint["total_steps"] != total_steps:
            log.info(
                f"the schedule was made for {checkpoint['total_steps']} steps and is now stretched "
                f"over {total_steps}: the learning rate jumps at step {step + 1}"
            )
        log.info(f"resuming after step {step}")
        del checkpoint  # a second copy of the weights and of the optimizer's state
    # A folder that is not shared, or that a disk's cache shows in an older state, ends here.
    check_agreement({"data": data_id, "--save-dir": shared, "step to resume from": step})
    # All ranks have started and have their data: from here on a long wait means that one is lost.
    dist.group.WORLD.set_timeout(timedelta(seconds=args.timeout))
    profiler = None
    if args.profile:
        profiler = start_profiler(run_dir / f"trace-rank{rank}.json", total_steps - step)
    history = read_metrics(run_dir, step)
    wandb_run = start_wandb(args, run_dir, history)

    # A signal to stop only leaves a note: all ranks must stop at the same step.
    signals = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))

    # Train.
    progress = tqdm(total=total_steps, initial=step, unit="step", disable=rank > 0 or None)
    sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
    losses, start_time = [], time.perf_counter()
    while step < total_steps:
        epoch, position = divmod(samples_seen, epoch_samples)
        sampler.set_epoch(epoch)  # else each epoch has the order of the first
        indices = list(sampler)  # every world_size-th of the permutation, from rank on
        # Starting in the middle of an epoch is a slice, however far the run has come. The loader
        # is given a generator because it would draw from the one that dropout uses.
        loader = DataLoader(
            train_data,
            args.batch_size,
            sampler=indices[position // world_size : epoch_samples // world_size],
            generator=torch.Generator(),
            pin_memory=on_gpu,
        )
        loss_sum = torch.zeros((), device=device)
        for micro_step, batch in enumerate(loader, start=1):
            input_ids = batch["input_ids"].to(device, non_blocking=True)
            # Gradients are averaged over the ranks during backward(). Only the last micro-batch
            # of a step needs that; before it, each rank adds up its own.
            with autocast, ddp_model.no_sync() if micro_step % micro_steps else nullcontext():
                loss = training_model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss = loss / micro_steps  # its share of the mean over the global batch
            loss.backward()
            loss_sum += loss.detach()
            if micro_step % micro_steps != 0:
                continue

            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            samples_seen += args.global_batch_size
            # The losses stay on the device: reading one makes the CPU wait for the GPU.
            losses.append(loss_sum)
            loss_sum = torch.zeros((), device=device)
            progress.update()

            save_now = step % args.ckpt_freq == 0 or step == total_steps
            if step % args.log_freq == 0 or save_now:
                losses = torch.stack(losses)
                dist.all_reduce(losses)  # the sum over the ranks
                losses /= world_size
                stop_if_not_finite(losses.tolist(), step, run_dir)
                stop_signal = torch.tensor(max(signals), device=device)
                dist.all_reduce(stop_signal, dist.ReduceOp.MAX)
                stop_signal = stop_signal.item()  # the same on all ranks, whoever got it
                tokens = len(losses) * args.global_batch_size * args.seq_length
                row = {
                    "step": step,
                    "loss": losses[-1].item(),
                    "lr": lr,
                    "grad_norm": grad_norm.item(),
                    "tokens_per_s": tokens / (time.perf_counter() - start_time),
                    "samples_seen": samples_seen,
                    "epoch": epoch,
                    "world_size": world_size,
                }
                if save_now:
                    row["val_loss"] = evaluate(model, val_data, args.batch_size, device, autocast)
                    stop_if_not_finite([row["val_loss"]], step, run_dir)
                write_metrics(row, run_dir, wandb_run, progress)
                if (save_now or stop_signal) and run_dir:
                    rng = [None] * world_size
                    dist.all_gather_object(rng, get_rng_state(device))
                    checkpoint = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "step": step,
                        "total_steps": total_steps,
                        "samples_seen": samples_seen,
                        "rng": rng,
                        "flags": flags,
                    }
                    if rank == 0:
                        save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
                if stop_signal and step < total_steps:
                    stop_all_ranks(stop_signal, step, wandb_run)
                losses, start_time = [], time.perf_counter()
            if profiler:
                profiler.step()
            if step == total_steps:
                break
    end_process_group()  # if rank 0 could not save the last step, no rank ends well
    progress.close()
    wandb_run.finish()

    # The result.
    if rank > 0:
        return
    if run_dir:
        save_model(run_dir / "model", model, tokenizer)
        log.info(f"the trained model is in {run_dir / 'model'}")
    print_sample(model, tokenizer, args.seq_length)


def launch(args):
    """Start the processes of this node and watch them; return when all have ended well."""
    settle_the_nodes(args)
    store = serve_the_store(args)  # noqa: F841  it ends with its last reference
    if args.nproc_per_node > 1:  # more threads than cores would only wait for each other
        threads = max(1, torch.get_num_threads() // args.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A signal to stop is passed on: the workers save, and end at the same step. Ctrl-C is for this
    # process alone, though the terminal sends it to all, and SIGUSR1, which Slurm sends to all, is
    # for nobody yet who would die of it: what is ignored now, the new processes inherit.
    signals = []
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    workers = mp.spawn(worker, (args,), args.nproc_per_node, join=False)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: signals.append(number))
        # If one fails, the others get a SIGTERM, and 30 s later a SIGKILL, as under torchrun.
        while not workers.join(timeout=0.5):
            for process in filter(mp.Process.is_alive, workers.processes if signals else []):
                os.kill(process.pid, signals[0])
            del signals[:1]
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        code = getattr(error, "exit_code", None)  # None: an exception, whose traceback it brings
        if code is None or code < 0:  # otherwise the rank itself has said why
            rank, _ = place(args.nnodes, args.nproc_per_node, args.node_rank, error.error_index)
            log.error(f"rank {rank} has failed: {error}")
        sys.exit(1 if code is None else code if code > 0 else 128 - code)
    except KeyboardInterrupt:
        sys.exit("stopped: with -e, the same command goes on from the last checkpoint")
    finally:
        for process in workers.processes:
            process.kill()


def settle_the_nodes(args):
    """Fill in from the environment what the flags leave open; exit if they contradict it."""
    env = {name: value for name, value in os.environ.items() if value}
    given = {"master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
    if "TORCHELASTIC_RUN_ID" in env:
        sys.exit("error: start this stage with python: it starts its processes without torchrun")
    for number, count, local in LAUNCHERS:
        if number in env and count in env:
            given |= {"node_rank": number, "nnodes": count}
            if env.get(local, "0") != "0":
                sys.exit(
                    f"error: {local} is {env[local]}: start this script once per node, not once "
                    "per GPU: it starts the other processes itself"
                )
            break
    else:  # the variables of a Slurm step are what srun sets; a batch script has those of the job
        if args.nnodes is None and int(env.get("SLURM_JOB_NUM_NODES", 1)) > 1:
            sys.exit(
                f"error: SLURM_JOB_NUM_NODES is {env['SLURM_JOB_NUM_NODES']}, but srun did not "
                "start this: put srun --ntasks-per-node=1 before it, or say --nnodes 1"
            )
    for name, variable in given.items():
        if variable not in env:
            continue
        flag, mine, theirs = f"--{name.replace('_', '-')}", getattr(args, name), env[variable]
        try:
            if variable == "PBS_NODEFILE":
                theirs = len(set(Path(theirs).read_text().split()))
            elif name != "master_addr":
                theirs = int(theirs)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {variable} is {theirs}: {error}: correct or unset it")
        if mine is None:
            setattr(args, name, theirs)
            log.info(f"{flag} {theirs} comes from {variable}")
        elif mine != theirs:
            sys.exit(
                f"error: {flag} is {mine}, but {variable} says {theirs}: drop the flag, or unset "
                "the variable"
            )
    args.nnodes = args.nnodes or 1
    if args.node_rank is None and args.nnodes > 1:
        sys.exit(f"error: --nnodes {args.nnodes}: say --node-rank too, another one on each node")
    args.node_rank = args.node_rank or 0
    if not 0 <= args.node_rank < args.nnodes:
        sys.exit(
            f"error: --node-rank {args.node_rank}: the nodes of --nnodes {args.nnodes} are 0 to "
            f"{args.nnodes - 1}"
        )
    gpus = torch.cuda.device_count()
    args.nproc_per_node = args.nproc_per_node or max(1, gpus)
    if 0 < gpus < args.nproc_per_node:
        host = socket.gethostname()
        sys.exit(
            f"error: --nproc-per-node {args.nproc_per_node}: {host} has {gpus} GPUs; "
            "with CUDA_VISIBLE_DEVICES= all processes use the CPU"
        )
    _, world_size = place(args.nnodes, args.nproc_per_node, args.node_rank, 0)
    if env.get("WORLD_SIZE", str(world_size)) != str(world_size):
        sys.exit(
            f"error: WORLD_SIZE is {env['WORLD_SIZE']}, but {args.nnodes} nodes x "
            f"{args.nproc_per_node} processes are {world_size}: correct the flags, or unset it"
        )


def serve_the_store(args):
    """Settle where the store is, through which the ranks meet; on node 0, serve and return it.

    Exit if the other nodes could not reach it there.
    """
    if args.nnodes > 1 and not args.master_addr:
        sys.exit(
            f"error: --nnodes {args.nnodes}: say --master-addr too: the name or address of node 0"
        )
    args.master_addr = args.master_addr or "127.0.0.1"
    if args.master_port is None:  # of one node any free one; of several all must know it
        args.master_port = 0 if args.nnodes == 1 else 29500
    if args.master_port > 65535:
        sys.exit(f"error: --master-port {args.master_port}: must be 1 to 65535")
    try:
        family, *_, (address, *_) = socket.getaddrinfo(args.master_addr, args.master_port)[0]
    except OSError as error:
        sys.exit(
            f"error: --master-addr {args.master_addr}: {error.strerror}: say a name that every "
            "node knows, or an address"
        )
    where = f"{args.master_addr}:{args.master_port} ({address})"
    if args.nnodes > 1 and ipaddress.ip_address(address).is_loopback:
        sys.exit(
            f"error: --master-addr {args.master_addr} is {address} on {socket.gethostname()}, "
            "where no other node can reach it: say the address of node 0 in the network"
        )
    if args.node_rank > 0:
        try:
            socket.create_connection((address, args.master_port), timeout=5).close()
        except OSError as error:  # no fault: node 0 may start later
            log.warning(f"node 0 does not answer yet at {where}: {error}: waiting for it")
        return None
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError as error:
        sys.exit(
            f"error: --master-addr {args.master_addr}: {address} is no address of this host, "
            f"{socket.gethostname()}, which is node 0: {error.strerror}"
        )
    try:
        socket.create_server(("", args.master_port)).close()
    except OSError as error:
        sys.exit(
            f"error: --master-port: cannot listen at {where}: {error.strerror}: choose another "
            "port, the same on all nodes"
        )
    store = dist.TCPStore(address, args.master_port, is_master=True, wait_for_workers=False)
    args.master_port = store.port
    return store


def place(nnodes, nproc_per_node, node_rank, local_rank):
    """Return the rank of a process, and how many there are: node after node, none left out."""
    assert 0 <= node_rank < nnodes and 0 <= local_rank < nproc_per_node
    return node_rank * nproc_per_node + local_rank, nnodes * nproc_per_node


def end_with_the_parent():
    """End this process when its parent ends, which may be in a way that it cannot pass on."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_process_group(on_gpu, timeout):
    """Return the rank of this process and their number, as `worker` has set them."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # At first waiting is no fault: some ranks may still be reading libraries from a slow disk.
    timeout = timedelta(seconds=max(timeout, 300))
    # MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK come from the environment. Instead of the last
    # two one can say it here: init_process_group(..., world_size=world_size, rank=rank).
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # from here on "cuda" is this GPU
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    dist.group.WORLD.get_group_store().set(f"host of rank {rank}", socket.gethostname())
    return rank, world_size


def end_process_group():
    """Leave the process group, when all ranks have come here."""
    # Kept until the process ends. DDP refers to the group too, and as the last to do so would wait
    # for gloo's threads, which may wait for Python's lock, which DDP then holds: forever.
    end_process_group.group = dist.group.WORLD
    dist.barrier()
    dist.destroy_process_group()


def what_must_be_equal(args):
    """Return {name: value} of what decides the training: flags, script and versions."""
    facts = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    del facts["--save-dir"]  # a shared folder may have another path on another host
    del facts["--node-rank"], facts["--master-addr"]  # and node 0 another name
    facts["train_llm.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    facts |= {name: version(name) for name in ("torch", "transformers", "datasets", "wandb")}
    facts["python"], facts["cuda"] = platform.python_version(), torch.version.cuda
    facts["nccl"] = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return facts


def check_agreement(facts, only_warn=()):
    """Exit on all ranks if a fact, {name: value}, is not the same on all, and say who differs."""
    everyone, complain = [None] * dist.get_world_size(), os.environ["LOCAL_RANK"] == "0"
    dist.barrier()  # so that all look at their clocks in the same moment
    dist.all_gather_object(everyone, (socket.gethostname(), time.time(), facts))
    clocks = [clock for _, clock, _ in everyone]
    if complain and max(clocks) - min(clocks) > 5:
        log.warning(f"the hosts' clocks are {max(clocks) - min(clocks):.0f} s apart: use NTP")
    table = []
    for name in facts:
        hosts = {}  # of each value; a dict of names keeps their order
        for host, _, theirs in everyone:
            hosts.setdefault(str(theirs.get(name)), {})[host] = None
        line = "; ".join(f"{value} on {', '.join(names)}" for value, names in hosts.items())
        if len(hosts) > 1 and name not in only_warn:
            table.append(f"\n    {name}: {line}")
        elif len(hosts) > 1 and complain:
            log.warning(f"the ranks differ, which may not matter: {name}: {line}")
    if table:
        sys.exit(f"error: the ranks must agree:{''.join(table)}" if complain else 1)


def stop_all_ranks(number, step, wandb_run):
    """Exit on all ranks after a step at which rank 0 has saved."""
    # It may come twice: from Slurm, which sends it to each process, and from the parent. Python has
    # no handlers while it ends: the second one would kill it, after all is done.
    signal.signal(number, signal.SIG_IGN)
    log.info(f"stopped by {signal.Signals(number).name} after step {step}; with -e it is saved")
    end_process_group()  # the launcher ends all as soon as one ends: wait for rank 0's save
    with suppress(ConnectionError):
        wandb_run.finish()
    # SIGUSR1 is a scheduler's warning, and was heeded: success. After SIGTERM the launcher must not
    # take the end of its processes for the end of the training.
    sys.exit(0 if number == signal.SIGUSR1 else 128 + number)


def find_the_lost(error):
    """Return one line about an error of communication: which rank to look at."""
    store, rank = dist.group.WORLD.get_group_store(), dist.get_rank()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # asking the store over a dead link would wait until the kernel gives up: 15 minutes
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return f"no answer from {address[0]}, which holds the store, nor from other ranks: {error}"
    if "imed out" in str(error):
        store.set("timed out", "")
    time.sleep(1)  # a rank that timed out has closed its connections, which others see sooner
    if not store.check(["timed out"]):  # closed first at a neighbour of the dead
        line = f"rank {rank} on {socket.gethostname()} saw: {error}"
        return "a rank has died; first, " + store.compare_set("died", "", line).decode()
    store.set(f"rank {rank} lives", "")
    time.sleep(4)  # whoever lives comes to the same error within moments
    lost = [r for r in range(dist.get_world_size()) if not store.check([f"rank {r} lives"])]
    names = [f"rank {r} on {store.get(f'host of rank {r}').decode()}" for r in lost[:8]]
    return f"no answer from {', '.join(names) or 'a rank that was slow'}: {error}"


def load_tokenizer_and_config(args):
    """Return the tokenizer and the config of --model-name; settle --seq-length."""
    if args.model_name is None:
        tokenizer = ByT5Tokenizer()  # a token is a byte, so it needs no vocabulary file
        eos = tokenizer.eos_token_id
        sizes = {"n_layer": 4, "n_head": 4, "n_embd": 192, "n_positions": 128}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            **sizes, **dropout, vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos
        )
    else:
        if not Path(args.model_name).is_dir():
            check_name("--model-name", args.model_name)
        try:
            config = AutoConfig.from_pretrained(args.model_name)
            tokenizer = AutoTokenizer.from_pretrained(args.model_name)
        except Exception as error:  # the libraries raise a dozen kinds
            sys.exit(explain("--model-name", args.model_name, error))
        if tokenizer.eos_token_id is None:
            sys.exit(f"error: --model-name {args.model_name}: the tokenizer has no EOS token")
    # A vocabulary padded to a multiple of 128 keeps the model's largest matrix product fast.
    config.vocab_size = math.ceil(max(config.vocab_size, len(tokenizer)) / 128) * 128

    positions = getattr(config, "max_position_embeddings", None) or math.inf
    args.seq_length = args.seq_length or min(positions, 1024)
    if args.seq_length > positions:
        sys.exit(f"error: --seq-length {args.seq_length}: this model has {positions} positions")
    return tokenizer, config


def load_data(args, tokenizer):
    """Return the training rows, the validation rows and what identifies them.

    A row is {"input_ids": int64[seq_length]}. The rows do not depend on how many processes make
    them, and every stage finds them in the cache of `datasets` once one has made them.
    """
    documents, column = load_documents(args)
    block, seq_length, eos = 100, args.seq_length, tokenizer.eos_token_id
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"  # half the disk for GPT-2's vocabulary

    def tokenize_and_pack(indices):
        # num_proc cuts the documents into parts anywhere. Whoever meets the first document of a
        # block packs the whole block, so the rows are the same wherever the cuts are.
        ids = [np.empty(0, dtype)]
        for start in (i for i in indices if i % block == 0):
            texts = [text for text in documents[start : start + block][column] if text]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {}
            ids += [np.array([*row, eos], dtype) for row in encoded.get("input_ids", [])]
        ids = np.concatenate(ids)
        # The block's tail, less than one row, is dropped: no row is ever padded.
        return {"input_ids": ids[: len(ids) // seq_length * seq_length].reshape(-1, seq_length)}

    # mp.spawn runs this file under another name than __main__. `datasets` must not take that for
    # another function, or the cache is not found, nor send its processes the whole of the file.
    tokenize_and_pack.__module__ = "__main__"
    dill.settings["recurse"] = True

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = documents.map(
        tokenize_and_pack,
        batched=True,
        batch_size=block,
        with_indices=True,
        input_columns=[],
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value(dtype))}),
        num_proc=min(cpus, len(documents) // block + 1),
        desc="tokenize and pack",
    ).with_format("torch")

    # Held out: the last 1 %, but not so many that evaluating them takes minutes.
    num_val = max(args.global_batch_size, min(len(rows) // 100, 128))
    num_train = len(rows) - num_val
    if num_train < args.global_batch_size:
        sys.exit(
            f"error: --dataset-name {args.dataset_name}: its {len(rows)} rows of {seq_length} "
            f"tokens are not enough for one global batch of {args.global_batch_size} to train on "
            "and one to validate on: lower --seq-length or --global-batch-size, or use more data"
        )
    some_rows = rows[:: max(1, len(rows) // 100)]["input_ids"].numpy()
    data_id = f"{len(rows)} rows {hashlib.sha256(some_rows.tobytes()).hexdigest()[:12]}"
    return rows.select(range(num_train)), rows.select(range(num_train, len(rows))), data_id


def load_documents(args):
    """Return the documents of --dataset-name, and the name of the column that holds the text."""
    name, source, options = args.dataset_name, args.dataset_name, {}
    if name is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "encodings", "pydoc_data", "site-packages", "dist-packages"}
        files = [f for f in stdlib.rglob("*.py") if not skip & set(f.relative_to(stdlib).parts)]
        source, options = "text", {"data_files": sorted(map(str, files))}
    elif Path(name).is_file():
        builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
        source, options = builders.get(Path(name).suffix, "text"), {"data_files": name}
    elif Path(name).is_dir():
        if not any(f.suffix in (".jsonl", ".json", ".parquet") for f in Path(name).rglob("*")):
            source, options = "text", {"data_dir": name}
    else:
        check_name("--dataset-name", name)
    if source == "text":
        options["sample_by"] = "document"  # each file is a document, not each line
    try:
        documents = load_dataset(source, args.dataset_subset, split="train", **options)
    except Exception as error:
        sys.exit(explain("--dataset-name", name, error))
    strings = (Value("string"), Value("large_string"))
    columns = [key for key, value in documents.features.items() if value in strings]
    if "text" not in columns and len(columns) != 1:
        sys.exit(
            f"error: --dataset-name {name}: needs a column 'text'; it has "
            + ", ".join(
                f"{key} ({getattr(value, 'dtype', 'nested')})"
                for key, value in documents.features.items()
            )
        )
    return documents, "text" if "text" in columns else columns[0]


def build_model(args, config):
    """Return the model in float32: untrained from its config, or --pretrained."""
    try:
        if args.pretrained:
            model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
            model.resize_token_embeddings(config.vocab_size)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        sys.exit(explain("--model-name", args.model_name, error))
    model.loss_type = "ForCausalLM"  # what GPT-2 would fall back to, with a warning
    # Rows have no padding, so these models' causal attention needs no mask. To find that out, the
    # library would read the GPU in every forward pass; compiled, it would build a mask, and lose
    # flash attention.
    plain = config.model_type in ("gpt2", "gpt_neox", "llama", "olmo2", "qwen2", "qwen3")
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if plain and not windows and model.config._attn_implementation == "sdpa":
        AttentionInterface.register("causal", sdpa_attention_forward)
        model.set_attn_implementation("causal")
    return model


@torch.no_grad()
def evaluate(model, val_data, batch_size, device, autocast):
    """Return the mean loss over val_data in nats per token; no random number is drawn."""
    model.eval()
    loss_sum = torch.zeros((), device=device)
    # Ranks may have different numbers of batches: hence not DDP's model, which would wait.
    first, stride = dist.get_rank() * batch_size, dist.get_world_size() * batch_size
    for start in range(first, len(val_data), stride):
        input_ids = val_data[start : start + batch_size]["input_ids"].to(device)
        with autocast:
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss_sum += loss * len(input_ids)
    model.train()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / len(val_data)


def stop_if_not_finite(losses, step, run_dir):
    """Exit with the first step whose loss is no number; losses are those up to step."""
    for at, loss in enumerate(losses, start=step - len(losses) + 1):
        if not math.isfinite(loss):
            kept = run_dir and (run_dir / "checkpoint.pt").exists()
            sys.exit(
                f"error: the loss is {loss} at step {at}: start anew with a lower --lr"
                + (f"; {run_dir / 'checkpoint.pt'} holds the last good state" if kept else "")
            )


def open_run_dir(args):
    """Return the folder of this run, made if need be (None without --experiment-name), and whose
    disk it is on: all ranks must see the one that rank 0 sees."""
    if args.experiment_name is None:
        return None, None
    run_dir = args.save_dir / args.experiment_name
    rank, store, mark = dist.get_rank(), dist.group.WORLD.get_group_store(), run_dir / "shared"
    try:
        (run_dir / f"rank{rank}").mkdir(parents=True, exist_ok=True)
        open(run_dir / "metrics.jsonl", "a").close()
        log_file = logging.FileHandler(run_dir / f"rank{rank}" / "log.txt")
        if rank == 0:
            mark.write_text(f"{time.time_ns()}")
            store.set("mark", mark.read_bytes())
    except OSError as error:
        sys.exit(f"error: --save-dir: cannot write to {run_dir}: {error.strerror}")
    log_file.setFormatter(logging.root.handlers[0].formatter)
    log.addHandler(log_file)
    same = store.get("mark") == (mark.read_bytes() if mark.exists() else None)
    return run_dir, "on the disk of rank 0" if same else "not shared"


def load_checkpoint(path, flags, model):
    """Return the checkpoint at path; exit if it is damaged, or was made otherwise than this run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        made_with = checkpoint["flags"]
        shapes = {name: tensor.shape for name, tensor in checkpoint["model"].items()}
    except Exception as error:
        sys.exit(
            f"error: {path} is damaged ({type(error).__name__}): put back a copy of it, or delete "
            "it to start over"
        )
    for name, now in flags.items():
        if made_with[name] != now:
            sys.exit(
                f"error: {name} was {made_with[name]} when {path} was written and is {now} now: "
                "go on with the old value, or choose another --experiment-name"
            )
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        sys.exit(
            f"error: {path} holds a model of other sizes than --model-name {flags['--model-name']} "
            "has now: put that model back, or choose another --experiment-name"
        )
    return checkpoint


def save_checkpoint(path, checkpoint):
    """Write beside path, then rename: whoever opens path finds the old file or the new, whole."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # else the new name can reach the disk before the contents
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        sys.exit(
            f"error: --save-dir: cannot write {path}: {error.__context__ or error}; the checkpoint "
            "before it is kept: make room, then run the same command again"
        )


def save_model(path, model, tokenizer):
    """Write a folder that AutoModelForCausalLM.from_pretrained and AutoTokenizer load."""
    partial = path.with_suffix(".partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except Exception as error:
        sys.exit(
            f"error: --save-dir: cannot write {path}: {error}; then run the same command again"
        )


def get_rng_state(device):
    """Return the states of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def read_metrics(run_dir, step):
    """Return the logged rows up to step, and drop the later ones from the file: they come again."""
    if run_dir is None:
        return []
    path, partial = run_dir / "metrics.jsonl", run_dir / "metrics.partial"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # no half line
    rows = [row for row in map(json.loads, lines) if row["step"] <= step]
    if dist.get_rank() > 0:
        return rows
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)
    return rows


def write_metrics(row, run_dir, wandb_run, progress):
    """Show one logged step, add it to metrics.jsonl and send it to wandb."""
    val_loss = f"val_loss {row['val_loss']:.4f}  " if "val_loss" in row else ""
    log.info(
        f"step {row['step']:>5}  loss {row['loss']:.4f}  {val_loss}lr {row['lr']:.1e}  "
        f"grad_norm {row['grad_norm']:.2f}  {row['tokens_per_s']:,.0f} tokens/s"
    )
    progress.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s")
    with suppress(ConnectionError):  # Slurm's SIGTERM also ends wandb's process: go on and save
        wandb_run.log(row, step=row["step"])
    if run_dir and dist.get_rank() == 0:
        try:
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            sys.exit(f"error: --save-dir: cannot write to {run_dir}: {error.strerror}")


def start_wandb(args, run_dir, history):
    """Return a wandb run that begins with the rows of history.

    It is offline unless WANDB_MODE says otherwise or the reader has logged in, and also when the
    server does not answer. Each start is a run of its own, since offline runs cannot be resumed.
    """
    mode = os.environ.get("WANDB_MODE")
    if run_dir is None:
        mode = "disabled"
    elif mode is None:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    options = {"project": "distributed-llm", "name": args.experiment_name, "dir": run_dir}
    # One run per rank, for the use of each GPU; in wandb's pages the group holds them together.
    options |= {"name": f"{options['name']}-rank{dist.get_rank()}", "group": args.experiment_name}
    options["dir"] = run_dir and run_dir / f"rank{dist.get_rank()}"
    options["config"] = {key: str(value) for key, value in vars(args).items()}
    options["settings"] = wandb.Settings(init_timeout=20, console="off", quiet=True)
    try:
        run = wandb.init(mode=mode, **options)
    except wandb.errors.CommError:
        log.warning("wandb's server does not answer: this run is logged offline")
        run = wandb.init(mode="offline", **options)
    every = max(1, len(history) // 1000)  # after 100,000 steps, all of them would take seconds
    for row in history[::-every][::-1]:  # counted from the last one
        run.log(row, step=row["step"])
    return run


def start_profiler(path, steps):
    """Return a profiler that writes a trace of the 6th to the 10th of the coming steps to path."""
    if steps < 10:
        sys.exit(f"error: --profile: needs 10 steps, and this run has {steps} to go")

    def write(profiler):
        path.unlink(missing_ok=True)
        profiler.export_chrome_trace(str(path))  # does not raise when it cannot write
        if path.exists():
            log.info(f"{path} shows where the time went: open it in https://ui.perfetto.dev")
        else:
            log.warning(f"--profile: cannot write {path}: is there room?")

    schedule = torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
    profiler.start()
    return profiler


def print_sample(model, tokenizer, seq_length):
    """Print what the model writes: three beginnings of a document (all end with EOS, so it knows
    what comes after one)."""
    model.eval()
    start = torch.full((3, 1), tokenizer.eos_token_id, device=model.device)
    texts = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(300, seq_length - 1),
        do_sample=True,
        top_k=20,
    )
    print("The model writes:")
    for text in tokenizer.batch_decode(texts, skip_special_tokens=True):
        print("-" * 40, text, sep="\n")


def check_name(flag, name):
    """Exit if name, which is no local path, cannot be on the hub or the hub does not answer.

    The libraries would retry for a minute, and then blame the name.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        sys.exit(f"error: {flag} {name}: no such file or folder")
    if is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        sys.exit(
            f"error: {flag} {name}: not a local path, and the hub at {constants.ENDPOINT} does not "
            f"answer ({type(error).__name__}). Without internet: run with --prepare-only where "
            "there is some, then here with HF_HUB_OFFLINE=1"
        )


def explain(flag, name, error):
    """Return one line for what a library raised when asked for name."""
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    offline = " from the cache (HF_HUB_OFFLINE is set)" if is_offline_mode() else ""
    return f"error: {flag} {name}: cannot be loaded{offline}: {reason[:300]}"


def parse_args():
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, is {text}")
        return int(text)

    def rate(text):
        if not 0 < float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be more than 0, is {text}")
        return float(text)

    parser = argparse.ArgumentParser(usage="%(prog)s [flags]  (--help lists them)")
    add = parser.add_argument
    # fmt: off
    add("-e", "--experiment-name", metavar="NAME",
        help="the run writes to SAVE_DIR/NAME and resumes from there; default: writes nothing")
    add("-m", "--model-name", metavar="NAME",
        help="hub name, or local folder, of a causal language model; it starts untrained from its "
        "config; default: a built-in tiny GPT-2 that reads bytes")
    add("--pretrained", action="store_true", help="start from the weights of --model-name")
    add("-d", "--dataset-name", metavar="NAME",
        help="hub name, or local file or folder of text, jsonl or parquet; default: the source "
        "code of Python's standard library")
    add("--dataset-subset", metavar="NAME", help="configuration of a hub data set")
    add("-b", "--batch-size", type=positive, default=8, metavar="N",
        help="sequences per process and micro-step: what fits in memory; default 8")
    add("--global-batch-size", type=positive, metavar="N",
        help="sequences per optimizer step over all processes: what decides the loss curve; "
        "default: batch size x processes")
    add("-s", "--seq-length", type=positive, metavar="N",
        help="tokens per sequence; default: as many as the model takes, at most 1024")
    add("--lr", type=rate, default=2e-3, help="peak learning rate; default 2e-3")
    add("--warmup-steps", type=positive, default=50, metavar="N",
        help="steps of linear warm-up; a cosine down to 10 %% of --lr follows; default 50")
    add("--num-epochs", type=positive, metavar="N",
        help="stop after so many passes over the data; default: no limit but --max-steps")
    add("--max-steps", type=positive, metavar="N",
        help="stop after so many optimizer steps; default: 1200, or none with --num-epochs")
    add("--seed", type=int, default=0, help="of weights, data order and dropout; default 0")
    add("--log-freq", type=positive, default=10, metavar="N",
        help="optimizer steps from one logged step to the next; default 10")
    add("--ckpt-freq", type=positive, default=100, metavar="N",
        help="optimizer steps from one evaluation and checkpoint to the next; default 100")
    add("--save-dir", type=Path, default=Path(__file__).resolve().parents[1] / "outputs",
        metavar="DIR", help="default: the folder outputs beside the stages' folders")
    add("--dtype", choices=["fp32", "bf16"],
        help="what autocast computes in, the weights being fp32; default: bf16 on GPUs that have "
        "it, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile; default: on GPUs only")
    add("--timeout", type=positive, default=300, metavar="SECONDS",
        help="how long a rank waits for the others in a step before it gives up; default 300")
    add("--nnodes", type=positive, metavar="N",
        help="number of nodes; default: what the scheduler says, or 1")
    add("--node-rank", type=int, metavar="N",
        help="which of them this is, from 0; default: what the scheduler says")
    add("--nproc-per-node", type=positive, metavar="N",
        help="processes per node; default: one per GPU, or 1 without")
    add("--master-addr", metavar="HOST",
        help="name or address of node 0, which serves the store; default: $MASTER_ADDR")
    add("--master-port", type=positive, metavar="PORT",
        help="its port; default: $MASTER_PORT, or 29500, or a free one if there is one node")
    add("--prepare-only", action="store_true",
        help="download, tokenize and cache, then exit; the job itself then needs no internet")
    add("--profile", action="store_true",
        help="write a torch.profiler trace of five steps to SAVE_DIR/NAME")
    # fmt: on
    args = parser.parse_args()
    if args.pretrained and not args.model_name:
        parser.error("--pretrained needs --model-name")
    name = args.experiment_name
    if name is not None and (not name or Path(name).name != name):
        parser.error(f"--experiment-name '{name}': must be a name, not a path")
    if args.profile and name is None:
        parser.error("--profile needs --experiment-name")
    if args.seq_length == 1:
        parser.error("--seq-length 1: must be at least 2, a token to read and one to predict")
    return args


def start_logging(name):
    log.setLevel(logging.INFO)
    name = f"{socket.gethostname()} {name}"
    logging.basicConfig(format=f"%(asctime)s [{name}] %(message)s", datefmt="%H:%M:%S")


def worker(local_rank, args):
    """Be one of the processes: say in the environment what torchrun would say there."""
    rank, world_size = place(args.nnodes, args.nproc_per_node, args.node_rank, local_rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": args.master_addr, "MASTER_PORT": str(args.master_port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # else rank 0 would serve it
    end_with_the_parent()
    os.register_at_fork(after_in_child=end_with_the_parent)  # the processes that make the rows
    start_logging(f"rank {rank}")
    if rank != 0:  # to the terminal; its folder gets all it says
        logging.root.handlers[0].addFilter(lambda line: line.levelno >= logging.WARNING)
    if rank != 0 or not sys.stderr.isatty():
        disable_progress_bars()  # a log file is no place for them
        transformers_logging.disable_progress_bar()
    try:
        main(args)
    except torch.OutOfMemoryError as error:
        sys.exit(
            "error: out of GPU memory: lower --batch-size and keep --global-batch-size (the losses "
            f"stay the same), or lower --seq-length. {str(error).splitlines()[0]}"
        )
    except RuntimeError as error:
        lost = re.search("gloo|NCCL|[Tt]imed out|peer|pair|socket", f"{type(error)} {error}")
        if dist.is_initialized() and lost:
            log.error(find_the_lost(error))
        raise


if __name__ == "__main__":
    start_logging("launcher")
    launch(parse_args())
