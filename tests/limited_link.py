"""How slow links slow training down: stage 03 on two hosts, one process each, at several speeds.

python tests/limited_link.py [--steps 8]

Prints for each speed and global batch the time of a step, and what was to be expected: the time
without a limit + the bytes that each host sends in one all-reduce / the speed of the link. A ring
all-reduce over n ranks sends 2 (n - 1) / n times the gradients' bytes from each rank.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from hosts import Hosts, finish
from stages import metrics, weights

LIMITS = {"no limit": 0, "1gbit": 1e9, "100mbit": 100e6, "10mbit": 10e6}


def seconds_per_step(hosts, folder, name, batch, steps):
    """Return the median over the logged steps, of which the first few are not counted."""
    flags = ["-e", name, "--save-dir", folder, "-b", 4, "--global-batch-size", batch]
    flags += ["--max-steps", steps + 3, "--log-freq", 1, "--ckpt-freq", 1000]
    runs = hosts.both(*flags)
    finish(*runs, timeout=600)
    rows = [row for step, row in metrics(folder / name).items() if 3 < step < steps + 3]
    return statistics.median(batch * 128 / row["tokens_per_s"] for row in rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        hosts = Hosts(folder)
        hosts("up")
        try:
            print(
                "link      global batch  s/step  expected  difference  of the speed without limit"
            )
            for batch in (8, 64):
                for name, bits in LIMITS.items():
                    if bits:
                        hosts("limit", name)
                    seconds = seconds_per_step(hosts, folder, f"{name}-{batch}", batch, args.steps)
                    if not bits:
                        free = seconds
                        tensors = weights(folder / f"{name}-{batch}")
                        tied = {tensor.data_ptr(): tensor for tensor in tensors.values()}
                        sent = sum(t.numel() * 4 for t in tied.values())  # 2 (n - 1) / n is 1 for 2
                        print(f"(each host sends {sent / 1e6:.2f} MB per step)")
                    expected = free + (sent * 8 / bits if bits else 0)
                    print(
                        f"{name:<9} {batch:>12}  {seconds:>6.3f}  {expected:>8.3f}  "
                        f"{seconds / expected - 1:>+10.0%}  {free / seconds:>6.0%}",
                        flush=True,
                    )
                hosts("limit", "off")
        finally:
            hosts.down()


if __name__ == "__main__":
    main()
