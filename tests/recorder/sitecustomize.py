"""In the processes of a script that is checked: write down what they do, for check_exercise.py.

Each rank appends lines to $RECORD/RANK.jsonl: the rows it trains on, that it saves, the GPU it
takes. With DIE, rank 0 kills itself as soon as a checkpoint is complete.
"""

import json
import os
import re
import sys


def note(**what):
    with open(f"{os.environ['RECORD']}/{os.environ.get('RANK', 0)}.jsonl", "a") as file:
        file.write(json.dumps(what) + "\n")


def die():
    if "DIE" in os.environ and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), 9)


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

        def init_process_group(*args, device_id=None, **kwargs):
            if device_id is not None:
                take(device_id)
            os._exit(0)  # far enough

        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: int(os.environ["GPUS"])
        torch.cuda.set_device, dist.init_process_group = take, init_process_group


by_multiprocessing = re.search("spawn_main|forkserver", str(sys.orig_argv))
if "RANK" in os.environ or "ALONE" in os.environ or by_multiprocessing:
    watch()  # not in torchrun itself, nor in a launcher
