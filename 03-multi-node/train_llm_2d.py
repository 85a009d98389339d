"""Stage 03, in two dimensions: ranks share each layer, and what is left of it is sharded. Again:

torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint node1:29500 \
    --rdzv-id 1 train_llm_2d.py -e nodes --max-steps 200

two_dimensions.md beside this file explains what changes, what it costs, and when you need it.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import sysconfig
import time
import warnings
import zipfile
from contextlib import suppress
from datetime import timedelta
from functools import partial
from glob import escape, glob
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
import torch.distributed as dist
import transformers
import wandb
from datasets import load_dataset
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, parallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

log = logging.getLogger("train_llm")

# A checkpoint goes on only with the flags that it was made with, as far as they shape the curve.
CURVE_FLAGS = ["--model-name", "--pretrained", "--dataset-name", "--dataset-subset", "--seq-length"]
CURVE_FLAGS += ["--global-batch-size", "--seed", "--lr", "--warmup-steps", "--dtype"]


@record  # torchrun shows the traceback of a rank that fails
def main(args):
    # Device and precision. The weights are float32 everywhere: autocast only runs the matrix
    # products in bf16. Pure bf16 weights would stop moving where a step is below their rounding.
    on_gpu = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # set by torchrun
    local_rank = int(os.environ["LOCAL_RANK"])  # the rank's number on its own node
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # Ranks that share each layer are a group, which has rows of its own as a rank has elsewhere.
    size = args.tensor_parallel = args.tensor_parallel or math.gcd(2, world_size)
    (groups, rest), group = divmod(world_size, size), rank // size
    if rest or size < 1:
        sys.exit(f"error: --tensor-parallel {size} does not divide {world_size} ranks")
    backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
    timeout = timedelta(seconds=args.timeout)
    dist.init_process_group(backend, device_id=gpu, timeout=timeout)
    kind = dist.ProcessGroupNCCL.Options if on_gpu else dist.ProcessGroupGloo._Options
    options = {0: kind(), 1: kind()}
    options[0]._timeout = options[1]._timeout = timeout  # which a mesh does not know by itself
    how = {"mesh_dim_names": ("data", "tensor"), "backend_override": options}
    mesh = dist.init_device_mesh(device.type, (groups, size), **how)
    args.compile = args.compile and size == 1  # compiled, DTensor's backward lacks an all-reduce
    fast_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bf16" if fast_bf16 else "fp32")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    # Batches. The global batch decides the loss curve; the micro-batch only has to fit in memory.
    args.global_batch_size = args.global_batch_size or args.batch_size * groups
    micro_steps, rest = divmod(args.global_batch_size, args.batch_size * groups)
    parts = f"--batch-size {args.batch_size} x {groups} groups of {size} ranks"
    if rest:
        sys.exit(f"error: --global-batch-size {args.global_batch_size} is no multiple of {parts}")

    # Model and data. The seed decides the initial weights, and then what dropout draws.
    torch.manual_seed(args.seed)
    dropout_rng = torch.cuda if on_gpu else torch  # where dropout draws its numbers
    # Rank 0 makes the rows while the others ask at the store: a collective would time out.
    store = dist.group.WORLD.get_group_store()
    while rank > 0 and not store.check(["data is ready"]):
        time.sleep(0.5)
    model, tokenizer = load_model(args, weights=rank == 0)  # one copy of them, not one per rank
    train_data, val_data, data_id = load_data(args, tokenizer)
    store.set("data is ready", "")
    dist.barrier()  # now all have seen it: the store may end with rank 0
    if args.prepare_only:
        dist.destroy_process_group()
        print(f"in the cache, also for jobs with HF_HUB_OFFLINE=1: {data_id}")
        return
    shard(model.train(), mesh, device, args.compile, args.recompute)
    torch.manual_seed(args.seed + group)  # the weights are made: let dropout differ by group

    # Optimizer and schedule: linear warm-up, then half a cosine down to a tenth.
    epoch_steps = len(train_data) // args.global_batch_size
    total_steps = args.num_epochs * epoch_steps if args.num_epochs else args.max_steps
    optimizer = AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, args.warmup_steps, total_steps, min_lr_rate=0.1
    )

    # Resume: whatever the next step depends on comes back.
    run_dir = args.save_dir / args.experiment_name if args.experiment_name else None
    flags = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in CURVE_FLAGS}
    flags["the data"] = data_id
    step, metrics_size, planned_steps = 0, 0, total_steps
    if run_dir and (run_dir / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(run_dir / "checkpoint.pt", flags)
        keep_parts(checkpoint, model)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        if checkpoint["rng_of"] == (device.type, groups, size):
            dropout_rng.set_rng_state(checkpoint["rng"][rank])
        else:  # the same loss curve, but dropout has to draw anew
            torch.manual_seed(args.seed + group + groups * checkpoint["step"])
        step, metrics_size = checkpoint["step"], checkpoint["metrics_size"]
        planned_steps = checkpoint["total_steps"]
        del checkpoint  # a second copy of the weights and of the optimizer's state

    # Where the numbers go. Without --experiment-name only to the terminal.
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers = [terminal]
    if run_dir:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / f"rank{rank}.log"))
    layout = f"%(asctime)s [{socket.gethostname()} rank {rank}] %(message)s"
    logging.basicConfig(format=layout, datefmt="%H:%M:%S", handlers=handlers)
    log.setLevel(logging.INFO)
    log.info(f"{model.num_parameters():,} parameters, {args.dtype} on {device}; {data_id}")
    tokens = f"{args.global_batch_size} x {args.seq_length:,} tokens per step"
    log.info(f"{parts} x {micro_steps} micro-steps: {tokens}, {epoch_steps:,} steps an epoch")
    log.info(f"step {step} of {total_steps}, folder: {run_dir or 'none (no --experiment-name)'}")
    if world_size == 1:
        log.info("one rank keeps all of the model: start more of them to shard it")
    if planned_steps != total_steps:
        log.info(f"the schedule was made for {planned_steps} steps: the learning rate jumps")
    writes = run_dir is not None and rank == 0
    if writes:
        metrics = run_dir / "metrics.jsonl"
        metrics.touch()
        os.truncate(metrics, metrics_size)  # the steps after the checkpoint come again
        (run_dir / "started").write_text(time.ctime())

    # What would go wrong silently: ranks that train otherwise, or in another folder of this name.
    dist.barrier()  # rank 0 has written "started"
    facts = {"--" + name.replace("_", "-"): value for name, value in vars(args).items()}
    facts |= {"the data": data_id, "the step to go on from": step}
    facts["train_llm.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    if run_dir:
        started = run_dir / "started"
        facts[started] = started.read_text() if started.exists() else "not there"
    check_agreement(facts)

    sys.excepthook = sys.__excepthook__  # torch's and wandb's would both print each traceback
    wandb_run = wandb.init(
        project="distributed-llm",
        name=f"{args.experiment_name}-rank{rank}",  # a run per rank, to see what each GPU does
        id=f"{args.experiment_name}-rank{rank}",
        group=args.experiment_name,
        resume="allow",
        dir=run_dir,
        mode=os.environ.get("WANDB_MODE", "offline") if run_dir else "disabled",
        config=vars(args),
        settings=wandb.Settings(silent=True, console="off"),
    )
    if args.profile:  # five steps; https://ui.perfetto.dev opens the file
        schedule = torch.profiler.schedule(wait=4, warmup=1, active=5, repeat=1)
        write = torch.profiler.tensorboard_trace_handler(run_dir, f"rank{rank}")
        profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=write)
        profiler.start()

    # A signal to stop only leaves a note: all ranks must save and stop at the same step.
    signals = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))

    # Train.
    batches = endless_batches(train_data, args, step * args.global_batch_size, mesh["data"])
    progress = tqdm(initial=step, total=total_steps, unit="step", disable=rank > 0 or None)
    logged_step, logged_time = step, time.perf_counter()
    while step < total_steps:
        loss_sum = torch.zeros((), device=device)
        for _ in range(micro_steps):
            input_ids = next(batches)["input_ids"].to(device, non_blocking=True)
            # Gradients are averaged over the ranks during backward(), and each rank keeps a part.
            # So in every micro-step: to add them up before, it would need room for all of them.
            with autocast:
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss = loss / micro_steps  # its share of the mean over the global batch
            loss.backward()
            loss_sum += loss.detach()
        grad_norm = clip_grad_norm(model.parameters(), 1.0)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if args.profile:
            profiler.step()

        # Up to here all stays on the device: to read a number, the CPU must wait for the GPU.
        save_now = step % args.ckpt_freq == 0 or step == total_steps
        if step % args.log_freq != 0 and not save_now:
            continue
        stop = torch.tensor(max(signals), device=device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)  # the same on all, whichever rank was told
        stop = stop.item()
        save_now = save_now or stop > 0
        dist.all_reduce(loss_sum)  # the sum over the ranks
        tokens = (step - logged_step) * args.global_batch_size * args.seq_length
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        memory = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * unit
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()  # the next line has the peak since this one
        row = {
            "step": step,
            "loss": loss_sum.item() / world_size,
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "tokens_per_s": tokens / (time.perf_counter() - logged_time),
            "memory_gb": memory / 1e9,
            "epoch": step / epoch_steps,
            "world_size": world_size,
        }
        if save_now and not stop:  # who is told to stop may not have the time for it
            row["val_loss"] = evaluate(model, val_data, args.batch_size, autocast, mesh["data"])
        if save_now and run_dir:
            rng = [None] * world_size
            dist.all_gather_object(rng, dropout_rng.get_rng_state())
            state = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        text = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
        if not all(map(math.isfinite, row.values())):  # nor are the weights, then: do not save
            sys.exit(f"error: not finite: {text}: start over with another name and a lower --lr")
        progress.clear()  # the line goes above the bar
        log.info(text)
        if writes:
            with open(metrics, "a") as file:
                print(json.dumps(row), file=file)
        if writes and save_now:
            checkpoint = {
                **state,
                "scheduler": scheduler.state_dict(),
                "rng": rng,
                "rng_of": (device.type, groups, size),
                "step": step,
                "total_steps": total_steps,
                "metrics_size": metrics.stat().st_size,
                "flags": flags,
            }
            save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
            if args.keep_every and step % (args.keep_every * args.ckpt_freq) == 0:
                (run_dir / f"checkpoint-{step}.pt").unlink(missing_ok=True)
                os.link(run_dir / "checkpoint.pt", run_dir / f"checkpoint-{step}.pt")
            del state, checkpoint  # or the next ones would be made beside them
        with suppress(ConnectionError):  # a scheduler's SIGTERM may have ended wandb's process
            wandb_run.log(row, step=step)
        logged_step, logged_time = step, time.perf_counter()
        if stop:
            break
    # On exit, Python restores default handlers, but keeps SIG_IGN: a late warning must not kill.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    progress.close()
    with suppress(ConnectionError):
        wandb_run.finish()

    # The end. The last that refers to the group would wait for gloo's threads, which may wait for
    # Python's lock, which it then holds, for ever: so keep the group.
    main.group = dist.group.WORLD
    if step >= total_steps:
        weights = whole(model.state_dict())  # while all ranks are there, which hold its parts
    dist.barrier()  # if rank 0 could not save the last step, no rank ends well
    dist.destroy_process_group()
    if step < total_steps:
        log.info(f"stopped by {signal.Signals(stop).name} after step {step}")
        # SIGUSR1 is a scheduler's warning, and was heeded: success. After SIGTERM no launcher must
        # take the end of its processes for the end of the training.
        sys.exit(0 if stop == signal.SIGUSR1 else 128 + stop)

    # The result: a folder that from_pretrained loads, and a look at what has been learned.
    if rank == 0:  # the whole model, which may be too large for the GPU: on the CPU, all of it
        torch.set_num_threads(os.cpu_count())
        model, _ = load_model(args)
        model.load_state_dict(weights)
    if writes:
        model.save_pretrained(run_dir / "model")
        tokenizer.save_pretrained(run_dir / "model")
    if rank == 0:
        print_sample(model, tokenizer, args.seq_length)


def check_agreement(facts):
    """Exit on all ranks if a fact is not the same everywhere, and say where it differs."""
    everyone, here = [None] * dist.get_world_size(), socket.gethostname()
    dist.all_gather_object(everyone, (here, facts))
    log.info("ranks 0, 1, ... are on " + ", ".join(host for host, _ in everyone))
    (first, expected), *others = everyone
    for host, theirs in others:
        for name, value in expected.items():
            if theirs.get(name) != value:
                sys.exit(f"error: {name} is {value} on {first}, but {theirs.get(name)} on {host}")


def load_model(args, weights=True):
    """Return the model in float32, untrained from its config or --pretrained, and its tokenizer.
    Without weights it is an outline on the device "meta": shapes, which take no memory."""
    if args.model_name is None:
        tokenizer = ByT5Tokenizer()  # a token is a byte, so it needs no vocabulary file
        sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
        words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = LlamaConfig(**sizes, **words, tie_word_embeddings=True)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name)
        config = AutoConfig.from_pretrained(args.model_name)
    positions = getattr(config, "max_position_embeddings", math.inf)
    args.seq_length = args.seq_length or min(positions, 1024)
    if args.seq_length > positions:
        sys.exit(f"error: --seq-length {args.seq_length}: the model has {positions} positions")
    if not args.pretrained:
        # The largest matrix product is that with the vocabulary; GPUs like multiples of 128.
        config.vocab_size = math.ceil(max(config.vocab_size, len(tokenizer)) / 128) * 128
    if args.pretrained and weights:
        model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
    else:
        with torch.device("cpu" if weights else "meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.loss_type = "ForCausalLM"  # what GPT-2 would fall back to, with a warning
    # Rows are full, and each is one sequence: plain causal attention. To find that out, the library
    # would read the GPU in every pass; compiled, it would build a mask: no flash attention then.
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
    transformers.AttentionMaskInterface.register("sdpa", mask_unless_causal)
    return model, tokenizer


def blocks_of(model):
    """Return the list of the model's blocks: that with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        sys.exit("error: --model-name: this model has no list of blocks (ModuleList) to shard")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def plans_of(model, size):
    """Return the model's plan for a block, and for the rest; exit if size ranks cannot follow."""
    styles = {  # activations are whole before and after: an all-reduce follows each "rowwise"
        "colwise": parallel.ColwiseParallel(),  # a rank has rows of the weight: some outputs
        "rowwise": parallel.RowwiseParallel(),  # columns: a summand of each output
        "colwise_gather_output": parallel.ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": parallel.RowwiseParallel(input_layouts=Replicate()),
        "replicated_with_grad_allreduce": parallel.SequenceParallel(use_local_output=True),
    }
    plan, error = size > 1 and model.tp_plan or {}, f"error: --tensor-parallel {size}: this model"
    if size > 1 and not {"rowwise"} <= set(plan.values()) <= styles.keys():
        sys.exit(f"{error} has no plan that is known here: {plan}")
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    cut = [name.rpartition(".")[0] + "." for name, style in plan.items() if style == "colwise"]
    for name, parameter in model.named_parameters():
        name = re.sub(r"\.\d+\b", ".*", name)
        planned = name.rpartition(".")[0] in plan
        if planned and any(n % size for n in (heads, *parameter.shape)):
            sys.exit(f"{error} has {heads} key/value heads, and {name} is {tuple(parameter.shape)}")
        if not planned and name.startswith(tuple(cut)):  # it would get a part of its gradient
            sys.exit(f"{error} has a plan that leaves out {name}")
    blocks = {n.partition(".*.")[2]: styles[style] for n, style in plan.items() if ".*." in n}
    return blocks, {n: styles[style] for n, style in plan.items() if ".*." not in n}


def shard(model, mesh, device, compile_blocks, recompute):
    """Share each layer over a group's ranks, and shard what each has of it over the groups."""
    plan, rest = plans_of(model, mesh["tensor"].size())
    how = {"device_mesh": mesh["tensor"], "src_data_rank": None}  # all have received the same
    for block in blocks_of(model):
        receive(block, device)
        parallel.parallelize_module(block, parallelize_plan=plan, **how)
        if compile_blocks:
            block.forward = torch.compile(block.forward)
        if recompute:  # what is inside it, in the backward pass, rather than keep that
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=True)
    receive(model, device)
    parallel.parallelize_module(model, parallelize_plan=rest, **how)
    model.tie_weights()  # embedding and head may be one parameter, and have been cut as two
    fully_shard(model, mesh=mesh["data"])
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the logits are such a view
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def clip_grad_norm(parameters, max_norm):
    """Clip by one norm over the parameters of all meshes, and return it. Torch's takes one mesh."""
    meshes = {}
    for parameter in (p for p in parameters if p.grad is not None):
        meshes.setdefault(parameter.device_mesh, []).append(parameter)
    norms = [get_total_norm(p.grad for p in group).full_tensor() for group in meshes.values()]
    norm = torch.stack(norms).norm()
    for group in meshes.values():
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def receive(module, device):
    """Fill a module with rank 0's weights: on the other ranks it is an outline until now."""
    for part in module.modules():
        if any(tensor.is_meta for tensor in (*part.parameters(False), *part.buffers(False))):
            part.to_empty(device=device, recurse=False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # embedding and head may be one tensor, and have been made as two
    # Buffers, too: no state dict has all of them (not the frequencies of rotary positions).
    for tensor in (*module.to(device).parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):  # that is of a block, which has been sharded before
            dist.broadcast(tensor.data, 0)


def whole(state):
    """Return state with its tensors whole, in rank 0's CPU memory. All ranks must call this."""
    memory = "cpu" if dist.get_rank() == 0 else "meta"  # meta: a shape without values
    return tree_map_only(DTensor, lambda parts: parts.full_tensor().to(memory), state)


def keep_parts(checkpoint, model):
    """Replace the whole tensors of a checkpoint by the parts that this rank keeps of them."""

    def part(tensor, like):
        if not isinstance(like, DTensor) or tensor.dim() == 0:  # a buffer, or the number of steps
            return tensor.clone()
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    weights, moments = checkpoint["model"], checkpoint["optimizer"]["state"]
    for name, like in model.state_dict().items():
        weights[name] = part(weights[name], like)
    for number, like in enumerate(model.parameters()):
        moments[number] = {name: part(value, like) for name, value in moments[number].items()}


def mask_unless_causal(**what):
    """Return the mask of attention that is more than causal (with a window, say), else None."""
    causal = what["mask_function"] is transformers.masking_utils.causal_mask_function
    skip = causal and what["allow_is_causal_skip"]
    return None if skip else transformers.masking_utils.sdpa_mask(**what)


def load_data(args, tokenizer):
    """Return the rows of seq_length tokens to train on, those to validate on, and what identifies
    them. `datasets` keeps them on disk, where every stage finds them once one has made them."""
    seq_length, eos = args.seq_length, tokenizer.eos_token_id

    def tokenize_and_pack(batch, indices):
        if indices[0] == 0:  # the first batch, which is here only if the rows are not in the cache
            tqdm.write("making the rows, once for all stages", file=sys.stderr)
        documents = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.concatenate([np.array([*document, eos], np.int32) for document in documents])
        # The tail, less than one row, is dropped: no row is ever padded.
        return {"input_ids": ids[: len(ids) // seq_length * seq_length].reshape(-1, seq_length)}

    texts = load_documents(args.dataset_name, args.dataset_subset).select_columns("text")
    how = {"with_indices": True, "batched": True, "num_proc": args.num_proc}
    rows = texts.map(tokenize_and_pack, remove_columns="text", **how).with_format("torch")
    # Held out: the last 1 %, but not so many that evaluating them takes minutes.
    num_train = len(rows) - max(args.global_batch_size, min(len(rows) // 100, 128))
    if num_train < args.global_batch_size:
        sys.exit(f"error: -d {args.dataset_name}: {len(rows)} rows, less than two global batches")
    some_rows = rows[:: max(1, len(rows) // 100)]["input_ids"].numpy()
    data_id = f"{len(rows)} rows {hashlib.sha256(some_rows.tobytes()).hexdigest()[:12]}"
    return rows.select(range(num_train)), rows.select(range(num_train, len(rows))), data_id


def load_documents(name, subset):
    """Return the documents of a hub data set, of a local file or folder, or Python's sources."""
    if name is None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "encodings", "pydoc_data", "site-packages", "dist-packages"}
        files = [f for f in stdlib.rglob("*.py") if not skip & set(f.relative_to(stdlib).parts)]
    elif Path(name).exists():
        files = [Path(f) for f in [name, *glob(f"{escape(name)}/**", recursive=True)]]
    else:
        return load_dataset(name, subset, split="train")
    files = sorted({f for f in files if f.is_file()})
    for suffix, kind in {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.items():
        if tables := [str(f) for f in files if f.suffix == suffix]:
            return load_dataset(kind, data_files=tables, split="train")
    texts = [str(f) for f in files]
    return load_dataset("text", data_files=texts, sample_by="document", split="train")


def load_checkpoint(path, flags):
    """Return the checkpoint; exit if it is damaged or was made with other flags or data."""
    if not zipfile.is_zipfile(path):
        sys.exit(f"error: {path} is damaged: put back a copy, or delete it to start over")
    # mmap: its whole tensors come into memory one after the other, as keep_parts cuts them.
    checkpoint = torch.load(path, map_location="cpu", mmap=True)
    for name, old in checkpoint["flags"].items():
        if flags[name] != old:
            sys.exit(
                f"error: {name} was {old} when {path} was written and is {flags[name]} now: "
                "put the old value back, or choose another --experiment-name"
            )
    return checkpoint


def endless_batches(data, args, samples_seen, mesh):
    """Yield micro-batches from where the run has come to, one epoch after the other."""
    sampler = DistributedSampler(data, mesh.size(), mesh.get_local_rank(), seed=args.seed)
    epoch_samples = len(data) // args.global_batch_size * args.global_batch_size
    while True:
        epoch, position = divmod(samples_seen, epoch_samples)
        sampler.set_epoch(epoch)  # else each epoch has the order of the first
        indices = list(sampler)  # of the permutation, the share of this rank
        # Starting in the middle of an epoch is a slice, however far the run has come.
        yield from DataLoader(
            data,
            args.batch_size,
            sampler=indices[position // mesh.size() : epoch_samples // mesh.size()],
            generator=torch.Generator(),  # or it would draw from the one that dropout uses
            pin_memory=torch.cuda.is_available(),
        )
        samples_seen += epoch_samples - position


@torch.no_grad()
def evaluate(model, data, batch_size, autocast, mesh):
    """Return the mean loss over data in nats per token; no random number is drawn."""
    model.eval()
    loss_sum = torch.zeros((), device=model.device)
    # All ranks must gather each block, so all need the same number of batches: where a rank has
    # none left, it computes one row that does not count.
    first, stride = mesh.get_local_rank() * batch_size, mesh.size() * batch_size
    for start in range(first, len(data) + first, stride):
        rows = data[min(start, len(data) - 1) : start + batch_size]
        input_ids = rows["input_ids"].to(model.device)
        with autocast:
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss_sum += loss * len(input_ids) * (start < len(data))
    dist.all_reduce(loss_sum, group=mesh.get_group())
    model.train()
    return loss_sum.item() / len(data)


def save_checkpoint(path, checkpoint):
    """Write beside path, then rename: whoever opens path finds the old file or the new, whole."""
    with open(path.with_suffix(".partial"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # else the new name can reach the disk before the contents
    os.replace(path.with_suffix(".partial"), path)


def print_sample(model, tokenizer, seq_length):
    """Print what the model writes after the end of a document: three beginnings of others."""
    start = torch.full((3, 1), tokenizer.eos_token_id, device=model.device)
    texts = model.eval().generate(
        start,
        attention_mask=torch.ones_like(start),
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=min(300, seq_length - 1),
        do_sample=True,
        top_k=20,
    )
    for text in tokenizer.batch_decode(texts, skip_special_tokens=True):
        print("-" * 40, text, sep="\n")


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, outputs = parser.add_argument, Path(__file__).resolve().parents[1] / "outputs"
    add_length = parser.add_mutually_exclusive_group().add_argument
    add("-e", "--experiment-name", help="write to SAVE_DIR/NAME and resume there; None: nowhere")
    add("-m", "--model-name", help="on the hub or a local folder; None: a small Llama on bytes")
    add("--pretrained", action="store_true", help="start from the weights of --model-name")
    add("-d", "--dataset-name", help="on the hub, or files (.jsonl, .parquet, text); None: Python")
    add("--dataset-subset", help="configuration of a data set on the hub")
    add("--num-proc", type=int, help="processes that make the rows; None: this one")
    add("-b", "--batch-size", type=int, default=8, help="micro-batch: sequences at once")
    add("--global-batch-size", type=int, help="per optimizer step; None: those of one micro-step")
    add("-s", "--seq-length", type=int, help="tokens; None: the model's, at most 1024")
    add("--lr", type=float, default=1e-3, help="peak of the learning rate")
    add("--warmup-steps", type=int, default=50, help="steps up to the peak")
    add_length("--max-steps", type=int, default=1200, help="optimizer steps")
    add_length("--num-epochs", type=int, help="passes over the data, instead of --max-steps")
    add("--seed", type=int, default=0, help="of the weights, the order of the data, and dropout")
    add("--log-freq", type=int, default=10, help="steps from one line of numbers to the next")
    add("--ckpt-freq", type=int, default=100, help="steps from one evaluation and save to the next")
    add("--keep-every", type=int, help="keep each Nth checkpoint, as checkpoint-STEP.pt; None: no")
    add("--save-dir", type=Path, default=outputs, help="folder that holds the runs' folders")
    add("--dtype", choices=["fp32", "bf16"], help="of autocast; None: bf16 on GPUs that have it")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--recompute", action="store_true", help="each block's activations in the backward pass")
    add("--tensor-parallel", type=int, help="ranks that share each layer; None: 2 or 1")
    add("--timeout", type=int, default=300, help="seconds that a rank waits for the others")
    add("--prepare-only", action="store_true", help="download, tokenize and cache, then exit")
    add("--profile", action="store_true", help="write a torch.profiler trace of five steps")
    args = parser.parse_args()
    if args.pretrained and not args.model_name or args.profile and not args.experiment_name:
        parser.error("--pretrained needs --model-name, --profile needs --experiment-name")
    for name in filter(None, (args.model_name, args.dataset_name)):
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            parser.error(f"no such file or folder: {name}")  # the libraries would blame the hub
    return args


if __name__ == "__main__":
    main(parse_args())
