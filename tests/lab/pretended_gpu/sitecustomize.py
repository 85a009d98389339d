"""Pretended GPUs, for a machine without one: PRETEND_GPUS=2 PYTHONPATH=.../pretended_gpu python ...

Tensors on them say that they are on "cuda:N". Their values are the CPU's, so losses are right; but
an operation that mixes them with CPU tensors fails as on a GPU, NCCL (really gloo) refuses CPU
tensors, random numbers come from a generator of the GPU's own, and each place where the CPU would
wait for the GPU is noted. No kernel, no NCCL and no compiler is tried: those need a real one.

WAITS=FILE: a JSON line each time: what it was, in which function of a library, and the lines of the
script, the innermost first, that led there; on real GPUs, too (where PRETEND_GPUS is not set).
It rests on parts of torch that may change.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import types
import warnings
from pathlib import Path

COUNT = int(os.environ.get("PRETEND_GPUS", "0"))


def load_guard():
    """Compile and load what torch's CPU build lacks. Must come before torch has looked for it."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    source = Path(__file__).with_name("guard.cpp")
    digest = hashlib.sha256(source.read_bytes() + str(root).encode()).hexdigest()[:12]
    built = Path(tempfile.gettempdir(), f"pretended-gpu-{digest}.so")
    if not built.exists():
        part = f"{built}.{os.getpid()}"
        line = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", source, "-o", part]
        line += [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(line, check=True)
        os.replace(part, built)
    return ctypes.CDLL(str(built))


LIBRARIES = (__file__, sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), "<")
WRAPPERS = (__file__, "_compile.py", "eval_frame.py")  # around each operation


def caller():
    """Return the innermost function, and FILE:LINE of each frame that is in no library."""
    frame, function, places = sys._getframe(1), None, []
    while frame:
        file = frame.f_code.co_filename
        if not function and not file.endswith(WRAPPERS):
            function = frame.f_code.co_name
        if not file.startswith(LIBRARIES):
            places.append(f"{file}:{frame.f_lineno}")
        frame = frame.f_back
    return function, places


def waits(what):
    """Note that the CPU waits for the GPU."""
    if "WAITS" in os.environ:
        function, places = caller()
        with open(os.environ["WAITS"], "a") as file:
            print(json.dumps({"what": what, "in": function, "where": places}), file=file)


def watch():
    """Note where the CPU waits for real GPUs, of which torch warns."""
    import torch

    def note(message, *where, **options):
        if "synchronizing CUDA operation" in str(message):
            waits("read")

    warnings.showwarning = note
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")


def install():
    guard = load_guard()
    import torch
    import torch._dynamo  # as long as torch.cuda tells it the truth
    import torch.cuda.nccl
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
    from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

    aten, c10d = torch.ops.aten, sys.modules["torch.distributed.distributed_c10d"]
    state = {"device": 0, "rng": torch.Generator()}

    class OnGpu(torch.Tensor):
        """A tensor of which the CPU sees shape and type, but not the values."""

        @staticmethod
        def __new__(cls, value):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                value.size(),
                strides=value.stride(),
                storage_offset=value.storage_offset(),
                dtype=value.dtype,
                device=torch.device("cuda", state["device"]),
                requires_grad=value.requires_grad,
            )

        def __init__(self, value):
            self._value = value

        def __reduce_ex__(self, protocol):  # torch.save copies to the CPU, and notes "cuda:0"
            waits("saved")
            return self._value.detach().__reduce_ex__(protocol)

        def untyped_storage(self):
            return self._value.untyped_storage()

        def tolist(self):
            return self.cpu().tolist()

        def resize_(self, *size):  # all_gather_object does, if the ranks' objects differ in length
            torch.utils.swap_tensors(self, OnGpu(self._value.clone().resize_(*size)))
            return self

        def __repr__(self, **options):
            return f"OnGpu({tuple(self.shape)}, {self.dtype})"

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return run(func, args, kwargs or {})

        __torch_function__ = torch._C._disabled_torch_function_impl

    def value(x):
        return x._value if isinstance(x, OnGpu) else x

    def on_gpu(x):
        return OnGpu(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x

    def run(func, args, kwargs):
        """Do an operation of torch with the values; refuse and note what a GPU would."""
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        gpu = any(isinstance(x, OnGpu) for x in tensors)
        asked = next((x for x in leaves if isinstance(x, torch.device)), None)
        to_gpu = asked.type == "cuda" if asked is not None else gpu
        mine = (None, state["device"], int(os.environ.get("LOCAL_RANK", "0")))
        if to_gpu and asked is not None and asked.index not in mine:
            raise RuntimeError(f"{asked} is another rank's: {caller()}")
        on_cpu = dict(kwargs)
        if "device" in kwargs and (asked is None or asked.type != "meta"):
            on_cpu["device"] = torch.device("cpu")
        if not gpu:
            on_cpu.pop("pin_memory", None)

        if func is aten._to_copy.default:  # one of two ways from one to the other
            pinned = kwargs.get("non_blocking") and args[0].is_pinned()
            if gpu and not to_gpu:
                waits("copied to the CPU")
            elif to_gpu and not gpu and not pinned:
                waits("copied to the GPU")
            out = func(value(args[0]), **on_cpu)
            return OnGpu(out) if to_gpu else out
        if func is aten.copy_.default:
            func(value(args[0]), value(args[1]), *args[2:], **kwargs)
            there, here = (isinstance(x, OnGpu) for x in args[:2])
            if there != here and (here or args[1].dim()):
                waits("copied to the CPU" if here else "copied to the GPU")
            return args[0]

        if gpu:
            for x in tensors:  # a number may stay on the CPU
                number = x.dim() == 0 and not x.requires_grad and func.namespace == "aten"
                if not isinstance(x, OnGpu) and not number:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device: {func}, {caller()}"
                    )
        elif func.namespace == "c10d" and tensors:
            line = "No backend type associated with device type cpu"
            raise RuntimeError(f"{line}: {func}, {caller()}")
        if gpu and func is aten._local_scalar_dense.default:
            waits("read")
        elif gpu and torch.Tag.dynamic_output_shape in func.tags:
            waits(f"{func}")

        random = to_gpu and torch.Tag.nondeterministic_seeded in func.tags
        if random:
            of_cpu = torch.get_rng_state()
            torch.set_rng_state(state["rng"].get_state())
        try:
            out = func(*tree_map(value, args), **tree_map(value, on_cpu))
        finally:
            if random:
                state["rng"].set_state(torch.get_rng_state())
                torch.set_rng_state(of_cpu)
        if not to_gpu:
            return out
        out = tree_map(on_gpu, out)
        if func.namespace == "aten" and gpu:
            return return_and_correct_aliasing(func, args, kwargs, out)
        known = {id(x._value): x for x in leaves if isinstance(x, OnGpu)}  # changed in place
        out = tree_map(lambda x: known.get(id(x._value), x) if isinstance(x, OnGpu) else x, out)
        return finished(out) if func.namespace == "c10d" else out

    def finished(out):
        """Wait for a collective, and return its result with a work that refers to it."""
        if not isinstance(out, tuple) or not isinstance(out[-1], torch.ScriptObject):
            return out
        dist.Work.unbox(out[-1]).wait()
        future = torch.futures.Future(devices=[torch.device("cuda", state["device"])])
        future.set_result([x for x in tree_flatten(out[:-1])[0] if isinstance(x, OnGpu)])
        work = torch._C._distributed_c10d._create_work_from_future(future)
        return (*out[:-1], work.boxed())

    class Gpu(TorchDispatchMode):
        """Sees also what makes a tensor out of nothing."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(kind is not OnGpu for kind in types):  # DTensor comes back with its parts
                return NotImplemented
            return run(func, args, kwargs or {})

    # What a script may ask torch.cuda.
    class Stream:
        """There is one stream, and it has always done all its work."""

        def __init__(self, *args, **options):
            pass

        def __getattr__(self, name):
            return lambda *args, **options: Stream()

    def set_device(device):
        index = device if isinstance(device, int) else torch.device(device).index
        if index >= COUNT:
            raise RuntimeError("CUDA error: invalid device ordinal")
        state["device"] = index
        guard.set_device(index)

    def set_rng_state(new, device="cuda"):
        if isinstance(new, OnGpu):
            raise TypeError(f"RNG state must be a torch.ByteTensor: {caller()}")
        state["rng"].set_state(new)

    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: COUNT
    cuda.set_device, cuda.current_device = set_device, lambda: state["device"]
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda._lazy_init = cuda.init = cuda.empty_cache = lambda: None
    cuda.manual_seed_all = cuda.manual_seed = lambda seed: state["rng"].manual_seed(seed)
    cuda.get_rng_state = lambda device="cuda": state["rng"].get_state()
    cuda.set_rng_state = set_rng_state
    cuda.max_memory_allocated = lambda device=None: 0  # nothing counts it
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: waits("synchronize")
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "pretended GPU"
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="pretended GPU", uuid=f"0000000{device or 0}-", total_memory=8e9, major=8, minor=0
    )
    cuda.nccl.version = lambda: (0, 0, 0)
    cuda.is_current_stream_capturing = lambda: False
    torch.accelerator.is_available = lambda: True
    torch.accelerator.device_count = lambda: COUNT
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.accelerator.set_device_index = set_device
    torch.accelerator.current_device_index = cuda.current_device
    torch._C._get_accelerator = lambda check=None: torch.device("cuda")
    torch.Tensor.record_stream = lambda self, stream: None

    def pin_memory(self, device=None):
        self = self.clone()
        self._pinned = True
        return self

    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = lambda self, device=None: bool(getattr(self, "_pinned", False))

    # NCCL is gloo. What it would refuse, `run` refuses: every collective comes through there.
    start = dist.init_process_group

    @functools.wraps(start)
    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        if backend not in (None, "nccl"):
            raise RuntimeError(f"on a GPU, and not NCCL: {backend}")
        if device_id is None or device_id.index != state["device"]:
            raise RuntimeError(f"device_id is {device_id}, after set_device({state['device']})")
        start("gloo", *args, **kwargs)

    def barrier(*args, **kwargs):  # of NCCL's own making: no tensor of the caller's
        waits("barrier")
        dist.all_reduce(torch.zeros(1, device="cuda"))

    dist.init_process_group, dist.barrier = init_process_group, barrier
    dist.ProcessGroupNCCL = types.SimpleNamespace(Options=dist.ProcessGroupGloo._Options)
    c10d.barrier, c10d._get_object_coll_device = barrier, lambda group=None: "cuda"
    dist.Logger.set_runtime_stats_and_log = lambda self: None  # wants CUDA's events

    data, tensor = torch._C.TensorBase.data, torch.tensor

    def set_data(self, new):  # FSDP moves parameters so
        if isinstance(new, OnGpu) and not isinstance(self, OnGpu):
            with torch.no_grad():
                new = torch.nn.Parameter(new) if isinstance(self, torch.nn.Parameter) else new
            torch.utils.swap_tensors(self, new)
        else:
            data.__set__(self, new)

    torch.Tensor.data = property(data.__get__, set_data)

    @functools.wraps(tensor)
    def make_tensor(data, *args, device=None, **kwargs):  # makes it where no mode sees it
        out = tensor(data, *args, **kwargs)
        return out if device is None else out.to(device)

    load = torch.load

    @functools.wraps(load)
    def load_to(file, map_location=None, **options):  # storages do not pretend, so tensors move
        found = load(file, map_location="cpu", **options)
        there = map_location is not None and torch.device(map_location).type == "cuda"
        return tree_map_only(torch.Tensor, lambda x: x.cuda(), found) if there else found

    torch.tensor, torch.load = make_tensor, load_to
    Gpu().__enter__()
    sys.modules["pretended_gpu"] = types.ModuleType("pretended_gpu")


# Not in torchrun itself, which would only lose time; but in the process that runs are forked from.
started = str(sys.orig_argv)
launcher = any(name in started for name in ("torch.distributed.run", "_tracker", "compile_worker"))
if COUNT and "pretended_gpu" not in sys.modules and ("forkserver" in started or not launcher):
    install()
elif "WAITS" in os.environ and not COUNT and not launcher:
    watch()
if "RECORD" in os.environ:
    runpy.run_path(f"{Path(__file__).parents[2]}/checker/recorder/sitecustomize.py")
