"""How much of DDP's all-reduce is hidden behind backward()?

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/overlap.py --batch-size 4

Times forward and backward of the built-in model without any all-reduce (no_sync), with DDP's, and
the all-reduce of as many bytes alone. If DDP adds less than the last, the difference was hidden; if
it adds more, as on CPUs whose cores are all busy, the ranks also waited for the slowest of them.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import AutoModelForCausalLM, GPT2Config


def timed(work, device):
    """Return the seconds that work() takes, begun by all ranks together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device(f"cuda:{dist.get_rank()}" if on_gpu else "cpu")
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=192, n_positions=128, vocab_size=384, bos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    model.loss_type = "ForCausalLM"
    ddp_model = DDP(model, gradient_as_bucket_view=True)
    ids = torch.randint(0, 256, (args.batch_size, 128), device=device)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)

    def backward():
        ddp_model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def backward_alone():
        with ddp_model.no_sync():
            backward()

    works = {"alone": backward_alone, "all-reduce": lambda: dist.all_reduce(gradients)}
    works["with DDP"] = backward
    times = {name: [] for name in works}
    for number in range(args.rounds + 5):
        for name, work in works.items():
            seconds = timed(work, device)
            if number >= 5:
                times[name].append(seconds * 1000)
    if dist.get_rank() == 0:
        ms = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"forward and backward alone {ms['alone']:.1f} ms, with DDP {ms['with DDP']:.1f} ms: "
            f"DDP adds {ms['with DDP'] - ms['alone']:.1f} ms; an all-reduce of "
            f"{gradients.numel() * 4 / 1e6:.1f} MB alone takes {ms['all-reduce']:.1f} ms "
            f"(medians of {args.rounds})"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
