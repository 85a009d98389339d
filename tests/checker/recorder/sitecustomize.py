"""In the processes of a script that is checked: write down what they do, for check_exercise.py.

Each rank appends lines to $RECORD/RANK.jsonl: the rows it trains on, that it saves, the GPU it
takes. With DIE, rank 0 kills itself as soon as a checkpoint is complete. With QUIET, for the
checker, also the collectives and from which line, and before each optimizer step a digest of
weights, gradients and random state; and a rank that has noted nothing for QUIET seconds writes to
RANK.stack where it is. With OTHER_WEIGHTS, each rank makes others, as without a seed. With FORKED,
mp.spawn forks: its processes need not import the libraries again.
"""

import faulthandler
import functools
import hashlib
import json
import os
import pickle
import re
import runpy
import sys
import time
import traceback
import types

STACKS = []


def note(**what):
    rank = os.environ.get("RANK", "0")
    with open(f"{os.environ['RECORD']}/{rank}.jsonl", "a") as file:
        file.write(json.dumps(what) + "\n")
    if "QUIET" in os.environ and "RANK" in os.environ:  # each note starts the clock again
        if not STACKS:
            STACKS.append(open(f"{os.environ['RECORD']}/{rank}.stack", "w"))  # noqa: SIM115
        faulthandler.dump_traceback_later(float(os.environ["QUIET"]), file=STACKS[0])


def die():
    if "DIE" in os.environ and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), 9)


def line_of_script():
    """Return the number of the line, in a file of no library, that the call comes from."""
    frame, libraries = sys._getframe(1), (__file__, sys.prefix, os.path.dirname(os.__file__))
    while frame and (frame.f_code.co_filename.startswith((*libraries, "<"))):
        frame = frame.f_back
    return frame.f_lineno if frame else None


def noted(owner, name, also=None):
    """Note each call of owner.name, before it is made. also: returns more of its arguments."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        more = also(*args, **kwargs) if also else {}
        note(call=name, line=line_of_script(), **more)
        return function(*args, **kwargs)

    setattr(owner, name, wrapper)


def here(tensor):
    """Return what this rank has of a tensor, which may be a DTensor."""
    return getattr(tensor, "_local_tensor", tensor).detach().cpu()


def digest(tensors):
    parts = map(here, tensors)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def watch():
    import torch
    import torch.distributed as dist
    from datasets import Dataset

    getitems, save, replace = Dataset.__getitems__, torch.save, os.replace

    def noted_getitems(self, keys):
        note(rows=list(map(int, keys)))
        return getitems(self, keys)

    def noted_save(what, file, *args, **kwargs):
        note(save=str(getattr(file, "name", file)))  # messages between ranks are "saved" too
        save(what, file, *args, **kwargs)
        if str(file).endswith("checkpoint.pt"):
            die()

    def noted_replace(old, new, **kwargs):
        replace(old, new, **kwargs)
        if str(new).endswith("checkpoint.pt"):
            die()

    Dataset.__getitems__, torch.save, os.replace = noted_getitems, noted_save, noted_replace

    if "GPUS" in os.environ:  # pretended, and nothing runs on them: which one is taken is all

        def take(device):
            index = torch.device("cuda", device).index if isinstance(device, int) else device.index
            note(gpu=index)

        def init_process_group(*args, device_id=None, world_size=None, **kwargs):
            if device_id is not None:
                take(device_id)
            size = world_size or os.environ.get("WORLD_SIZE", 0)
            note(world_size=int(size), local_rank=int(os.environ.get("LOCAL_RANK", 0)))
            os._exit(0)  # far enough

        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: int(os.environ["GPUS"])
        torch.cuda.set_device, dist.init_process_group = take, init_process_group


def watch_closely():
    """Note what the checker asks for, and no other test."""
    import torch
    import torch.distributed as dist
    import torch.distributed.fsdp as fsdp
    import torch.distributed.run as launcher
    import torch.multiprocessing as mp
    import wandb
    from datasets import Dataset
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel as DDP
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.data import DistributedSampler
    from transformers import AutoModelForCausalLM

    if "RANK" in os.environ:
        note(began=True)
    rows_from, clip = Dataset.map, torch.nn.utils.clip_grad_norm_
    backward, from_config = torch.Tensor.backward, AutoModelForCausalLM.from_config
    wandb_init = wandb.init

    def noted_map(self, function=None, *args, **kwargs):
        began = time.time()
        if os.environ.get("RANK") == "0" and "DIE" in os.environ:  # in the first run
            time.sleep(1)  # whoever does not wait for rank 0 is seen to begin meanwhile
        rows = rows_from(self, function, *args, **kwargs)
        note(map=[began, time.time()], module=getattr(function, "__module__", None))
        return rows

    def gradients(parameters):
        return digest(p.grad for p in parameters if p.grad is not None)

    @functools.wraps(clip)
    def noted_clip(parameters, *args, **kwargs):
        # A list, because a generator would be empty for whoever comes second.
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        note(call="clip", grads=gradients(parameters))
        return clip(parameters, *args, **kwargs)

    @functools.wraps(backward)
    def noted_backward(*args, **kwargs):
        note(call="backward", line=line_of_script())
        backward(*args, **kwargs)
        note(call="end of backward")

    def before_step(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = digest([torch.get_rng_state()])
        torch.rand(1)  # as dropout would, which the checker's model does not have
        note(
            step=gradients(parameters),
            weights=digest(parameters),
            rng=[before, digest([torch.get_rng_state()])],
            parts=sum(isinstance(p, DTensor) for p in parameters),
            each=[
                [digest([p]), here(p.grad).norm().item()] for p in parameters if p.grad is not None
            ],
        )

    def other_weights(*args, **kwargs):
        model = from_config(*args, **kwargs)
        for parameter in model.parameters():  # rank 0's stay as they are
            parameter.data *= 1 + int(os.environ.get("RANK", 0)) / 2
        return model

    def noted_wandb(*args, **kwargs):
        if kwargs.get("mode", "online") != "disabled":
            note(wandb=kwargs.get("id"))
        return wandb_init(*args, **kwargs | {"mode": "disabled"})

    Dataset.map, torch.nn.utils.clip_grad_norm_ = noted_map, noted_clip
    torch.Tensor.backward, wandb.init = noted_backward, noted_wandb
    if "OTHER_WEIGHTS" in os.environ:
        AutoModelForCausalLM.from_config = other_weights
    if "FORKED" in os.environ:
        mp.spawn, launcher.run_script_path = spawn_by_fork, run_script
    register_optimizer_step_pre_hook(before_step)
    for name in COLLECTIVES:
        noted(dist, name)
    noted(DDP, "forward")
    noted(DDP, "no_sync")
    noted(fsdp, "fully_shard", lambda module, **kwargs: {"module": type(module).__name__})
    noted(DistributedSampler, "__init__", told)


COLLECTIVES = ["all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object", "reduce"]
COLLECTIVES += ["broadcast_object_list", "all_gather_into_tensor", "reduce_scatter_tensor"]


def told(self, dataset, num_replicas=None, rank=None, shuffle=True, seed=0, *args, **kwargs):
    return {"num_replicas": num_replicas, "shuffle": shuffle, "seed": seed}


def run_script(script, *flags):
    """Do what a rank of torchrun does that is forked, but show each rank's traceback, as usual."""
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise


def spawn_by_fork(function, args=(), nprocs=1, join=True, daemon=False):
    """Do what mp.spawn does, but for the imports of the libraries."""
    import torch.multiprocessing as mp

    what = pickle.dumps((function, args)), os.path.abspath(sys.argv[0])
    return mp.start_processes(as_if_spawned, what, nprocs, join, daemon, "fork")


def as_if_spawned(local_rank, pickled, script):
    main = types.ModuleType("__mp_main__")
    main.__dict__.update(runpy.run_path(script, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    function, args = pickle.loads(pickled)
    function(local_rank, *args)


by_multiprocessing = re.search("spawn_main|forkserver", str(sys.orig_argv))
if "RANK" in os.environ or "ALONE" in os.environ or by_multiprocessing:
    watch()  # not in torchrun itself, nor in a launcher
    if "QUIET" in os.environ:
        watch_closely()
