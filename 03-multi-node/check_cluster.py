"""Is this cluster fit to train on? Run it with the torchrun line of the training:

torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint node1:29500 \
    --rdzv-id check check_cluster.py --parameters 124e6

Rank 0 prints what it found; exit status 1 means that something must be cured first. Everything
before the process group goes through torchrun's store, which works where gloo and NCCL do not yet.
"""

import argparse
import faulthandler
import fcntl
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist


def main():
    args = parse_args()
    timeout = timedelta(seconds=args.timeout)
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)

    # What each rank knows by itself.
    mine = look_around(args)
    reports = exchange(store, "report", mine)
    exchange(store, "ready", None)  # a short one: all ranks come out of it in the same moment
    clock = time.time()
    clocks = exchange(store, "clock", clock)
    problems, notes, can_meet = judge(reports, clocks)

    # The disks: what rank 0 writes and locks, the others must see.
    for name, folder in {"--save-dir": args.save_dir, "HF_HOME": mine["cache"]}.items():
        seen = check_disk(store, name, Path(folder))
        for report, (works, locks, text) in zip(reports, seen, strict=True):
            report[name], line = text, f"{name} on {report['host']}: {text}"
            if not works and name == "--save-dir":
                problems.append((line, "choose a folder with room, on a disk that all hosts share"))
            elif not works:
                notes.append(f"{line}: prepare the data on each host (--prepare-only)")
            elif not locks:
                notes.append(f"{line}: let one process at a time prepare data (--prepare-only)")

    # The process group, and how fast it is.
    speeds = {}
    if can_meet:
        store.set_timeout(3 * timeout)  # the others may take twice the timeout to fail
        faulthandler.dump_traceback_later(3 * args.timeout, exit=True)  # NCCL may wait for ever
        error = start_process_group(store, mine["gpu"], timeout)
        errors = exchange(store, "group", error)
        faulthandler.cancel_dump_traceback_later()
        for report, error in zip(reports, errors, strict=True):
            if error:
                line = f"rank {report['rank']} on {report['host']} cannot join the group: {error}"
                problems.append((line, "look for a firewall between the hosts, or a wrong address"))
        if not any(errors):
            speeds = measure(reports, args)
            notes += speeds.pop("notes")
            dist.destroy_process_group()
    else:
        notes.append("the process group was not tried: it would only wait")

    if rank == 0:
        show(reports, clocks, speeds, problems, notes, args)
    leave_together(store)
    sys.exit(1 if problems else 0)


def exchange(store, name, value):
    """Return every rank's value, in the order of the ranks; exit if one does not come."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"{name} {rank}", json.dumps(value))
    if rank == 0:  # one rank collects and all read the result: 2 n messages instead of n x n
        values = []
        for other in range(world_size):
            try:
                values.append(json.loads(store.get(f"{name} {other}")))
            except RuntimeError:
                sys.exit(f"error: rank {other} has not sent its {name} in time (--timeout)")
        store.set(name, json.dumps(values))
    return json.loads(store.get(name))


def look_around(args):
    """Return what this rank knows of its host, its GPU and its software, ready for JSON."""
    host, addresses = socket.gethostname(), interfaces()
    try:
        resolves_to = socket.gethostbyname(host)
    except OSError:
        resolves_to = None
    gpu = driver = None
    if torch.cuda.is_available():
        index = int(os.environ["LOCAL_RANK"])
        if index < torch.cuda.device_count():
            found = torch.cuda.get_device_properties(index)
            gpu = {"index": index, "name": found.name, "uuid": str(found.uuid)}
            gpu["GB"] = round(found.total_memory / 1e9)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):  # containers may lack it
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    asked = os.environ.get("NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME")
    by_name = [name for name, address in addresses.items() if address == resolves_to]
    limits = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}
    return {
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "host": host,
        "addresses": addresses,
        "resolves_to": resolves_to,
        "asked_interface": asked,
        "interface": asked or (by_name or [None])[0],
        "gpus": torch.cuda.device_count(),  # as the driver counts, also those torch cannot use
        "usable": torch.cuda.is_available(),
        "gpu": gpu,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "datasets", "wandb")},
            "cuda": torch.version.cuda or torch.version.hip,
            "nccl": str(torch.cuda.nccl.version()) if gpu else None,
            "driver": driver,
        },
        "limits": {name: resource.getrlimit(which)[0] for name, which in limits.items()},
        "cache": os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),
        "compute_s": time_computing(gpu),
    }


def interfaces():
    """Return {name: IPv4 address} of this host's network interfaces (Linux)."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # it has no address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def time_computing(gpu):
    """Return the seconds of one product of matrices: the same work on every rank."""
    device = torch.device("cuda", gpu["index"]) if gpu else torch.device("cpu")
    a = torch.ones(8192 if gpu else 512, 8192 if gpu else 512, device=device)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # item() waits for the GPU
        times.append(time.perf_counter() - start)
    return min(times)  # what it can do when nothing else disturbs it


def judge(reports, clocks):
    """Return [(what is wrong, its cure)], [what is worth knowing], can the ranks meet at all?"""
    problems, notes, can_meet = [], [], True
    hosts = {report["host"]: report for report in reports}
    for host, report in hosts.items():
        local = [r for r in reports if r["host"] == host]
        address, names = report["resolves_to"], ", ".join(report["addresses"])
        variable = "NCCL_SOCKET_IFNAME" if report["gpu"] else "GLOO_SOCKET_IFNAME"
        asked = report["asked_interface"]
        if asked and not report["gpu"] and asked not in report["addresses"]:
            line = f"{host} has no interface {asked} ({variable}); it has {names}"
            problems.append((line, f"set {variable} to one of them on all hosts"))
            can_meet = False
        elif report["gpu"]:
            pass  # NCCL does not look its own name up: it picks an interface
        elif len(hosts) > 1 and not asked and address is None:
            line = f"{host} cannot find the address of its own name"
            problems.append((line, f"add it to /etc/hosts, or set {variable} (it has {names})"))
            can_meet = False
        elif len(hosts) > 1 and not asked and address.startswith("127."):
            line = f"{host} resolves its own name to {address}, where no other host can reach it"
            cure = f"put its real address in /etc/hosts, or set {variable} (it has {names})"
            problems.append((line, cure))
            can_meet = False
        if report["gpus"] and not report["usable"]:
            torch_is = report["versions"]["torch"]
            line = f"{host} has {report['gpus']} GPUs, which torch {torch_is} cannot use"
            problems.append((line, "a newer driver, or torch built for an older CUDA"))
            can_meet = False
        elif report["gpus"] and any(r["gpu"] is None for r in local):
            line = f"{host} runs {len(local)} processes and has {report['gpus']} GPUs"
            problems.append((line, "lower --nproc-per-node, or let each process see all GPUs"))
            can_meet = False
        if report["limits"]["open files"] < 4096:
            files = report["limits"]["open files"]
            notes.append(f"{host} allows {files} open files: ulimit -n 65536 before torchrun")
        ahead = clocks[report["rank"]] - clocks[0]
        if abs(ahead) > 1:
            line = f"the clock of {host} is {ahead:+.0f} s off rank 0's"
            problems.append((line, "run an NTP client: torchrun takes late hosts for dead ones"))
    if len({bool(report["gpu"]) for report in reports}) > 1:
        without = [host for host, report in hosts.items() if not report["gpu"]]
        line = f"there is no GPU on {', '.join(without)}, but on other hosts"
        problems.append((line, "check the GPU request of the job, and nvidia-smi there"))
        can_meet = False
    for name in reports[0]["versions"]:
        values = {}
        for report in reports:
            values.setdefault(report["versions"][name], {})[report["host"]] = None
        if len(values) > 1:
            line = "; ".join(f"{value} on {', '.join(on)}" for value, on in values.items())
            problems.append((f"{name}: {line}", "install the same environment on all hosts"))
    uuids = {}
    for report in reports:
        if report["gpu"]:
            uuids.setdefault((report["host"], report["gpu"]["uuid"]), []).append(report["rank"])
    for (host, uuid), ranks in uuids.items():
        if len(ranks) > 1:
            line = f"ranks {ranks} on {host} use the same GPU {uuid}"
            problems.append((line, "let each process see all GPUs of its job, in the same order"))
            can_meet = False
    usual = statistics.median(report["compute_s"] for report in reports)
    for report in reports:
        if report["compute_s"] > 1.5 * usual:
            slower = f"{report['compute_s'] / usual:.1f} x slower than the median"
            notes.append(
                f"rank {report['rank']} on {report['host']} computes {slower}: all wait for it"
            )
    return problems, notes, can_meet


def check_disk(store, name, folder):
    """Return for each rank: can all write and see what rank 0 writes, do its locks hold, a text."""
    rank, works, locks, error, mark = int(os.environ["RANK"]), True, True, None, None
    # A name of its own: another preflight may look at the same folder in the same moment.
    own = folder / f".check_cluster-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text("x")
        mark, free = own.name, shutil.disk_usage(folder).free / 1e9
        text, works = f"{free:,.1f} GB free", free >= 1
    except OSError as problem:
        text, works = f"cannot write: {problem.strerror}", False
    if rank == 0 and mark:
        error = lock(own)
    mark = exchange(store, f"{name} mark", mark)[0]
    if rank > 0 and works and mark and not (folder / mark).exists():
        text, works = "not the disk of rank 0", False
    elif rank > 0 and works and mark:
        error = lock(folder / mark)
        if not error:
            text, locks = f"{text}; a lock that rank 0 holds is not seen", False
    if error and not isinstance(error, BlockingIOError):  # which is as it should be
        text, locks = f"{text}; no locks on files: {error.strerror}", False
    seen = exchange(store, f"{name} seen", [works, locks, f"{folder}: {text}"])
    with suppress(OSError):  # it may never have been made
        own.unlink()
    return seen


def lock(path):
    """Lock a file until this process ends, or return the error that says why not."""
    try:
        fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error


def leave_together(store):
    """Rank 0 leaves last: it may be the one that serves the store, which the others still read."""
    exchange(store, "end", None)
    if int(os.environ["RANK"]) > 0:
        store.set(f"{os.environ['RANK']} has left", "")
        return
    with suppress(RuntimeError):  # one that was ended by force says nothing
        store.wait([f"{rank} has left" for rank in range(1, int(os.environ["WORLD_SIZE"]))])


def start_process_group(store, gpu, timeout):
    """Join the process group. Return the error if that fails: NCCL's cause is in its last line."""
    device = torch.device("cuda", gpu["index"]) if gpu else None
    if gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            device_id=device,
        )
        dist.barrier()
    except RuntimeError as error:
        lines = str(error).splitlines()
        return " ... ".join(dict.fromkeys([lines[0][:200], lines[-1][:200]]))


def measure(reports, args):
    """Return the times of all-reduces per kind of link, of the links one by one, and notes."""
    device = torch.device("cuda" if reports[0]["gpu"] else "cpu")
    by_host = {}
    for report in reports:
        by_host.setdefault(report["host"], []).append(report["rank"])
    first_ranks = [ranks[0] for ranks in by_host.values()]
    kinds = {"all ranks": [[report["rank"] for report in reports]]}
    if len(by_host) > 1 and len(reports) > len(by_host):
        kinds["inside a host"] = [ranks for ranks in by_host.values() if len(ranks) > 1]
        kinds["between hosts"] = [first_ranks]
    result = {"all-reduce": {}, "notes": []}
    for kind, lists in kinds.items():
        timeout = timedelta(seconds=args.timeout)
        mine, _ = dist.new_subgroups_by_enumeration(lists, timeout=timeout)
        result["all-reduce"][kind] = time_all_reduces(mine, device, args.largest)

    # Each host sends to the next one: of a slow cable both ends are slow.
    if len(first_ranks) > 1:
        pairs = time_neighbours(first_ranks, device)
        names = list(by_host)
        result["links"] = {
            f"{names[i - 1]} -> {names[i]}": seconds for i, seconds in enumerate(pairs)
        }
        usual = statistics.median(pairs)
        for link, seconds in result["links"].items():
            if seconds > 2 * usual:
                slower = f"{seconds / usual:.1f} x slower than the median"
                result["notes"].append(f"the link {link} is {slower}")
    return result


def time_all_reduces(group, device, largest):
    """Return [(bytes, seconds)]: from 1 KB up, each the slowest rank's median of several."""
    results, size, slowest = [], 1024, 0
    while size <= largest and slowest < 0.5:  # seconds: the next one takes 8 times as long
        data, seconds = torch.zeros(size // 4, device=device), 0.0
        if group is not None:  # else this rank has no part in this kind of link
            times = []
            for _ in range(9 if slowest < 0.05 else 3):
                start = time.perf_counter()
                dist.all_reduce(data, group=group)
                data[0].item()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])  # the first one opens connections
        everyone = torch.tensor(seconds, device=device)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        slowest = everyone.item()
        results.append((size, slowest))
        size *= 8
    return results


def time_neighbours(ranks, device, size=1 << 20):
    """Return for each of ranks the seconds in which 1 MB came from the one before it."""
    rank, seconds = dist.get_rank(), torch.zeros(len(ranks), device=device)
    place = ranks.index(rank) if rank in ranks else None
    data, incoming = torch.zeros(2, size // 4, device=device)
    for _ in range(2):  # the first time opens the connection
        dist.barrier()
        if place is not None:
            to, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
            start = time.perf_counter()
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.irecv, incoming, before), dist.P2POp(dist.isend, data, to)]
            )
            for work in works:
                work.wait()
            incoming[0].item()
            seconds[place] = time.perf_counter() - start
    dist.all_reduce(seconds)
    return seconds.tolist()


def show(reports, clocks, speeds, problems, notes, args):
    """Print the report, and write it to --json."""
    rows = [["rank", "host", "address", "interface", "device", "computes in", "clock"]]
    for report, clock in zip(reports, clocks, strict=True):
        gpu = report["gpu"]
        rows.append(
            [
                str(report["rank"]),
                report["host"],
                report["addresses"].get(report["interface"]) or str(report["resolves_to"]),
                report["interface"] or "?",
                f"{gpu['name']} {gpu['uuid'][:8]}" if gpu else "CPU",
                f"{report['compute_s'] * 1e3:.1f} ms",
                f"{clock - clocks[0]:+.2f} s",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    first = reports[0]
    print("versions: " + ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v))
    for name in ("--save-dir", "HF_HOME"):
        print(f"{name}: {first[name]}")
    for kind, results in speeds.get("all-reduce", {}).items():
        (small, latency), (size, seconds) = results[0], results[-1]
        large = f"{size / 1e6:,.1f} MB in {seconds:.3f} s = {size / seconds / 1e9:.3g} GB/s"
        print(f"all-reduce, {kind}: {small} bytes in {latency * 1e6:,.0f} us; {large}")
    if speeds:
        size, seconds = speeds["all-reduce"]["all ranks"][-1]
        gradients = 4 * args.parameters
        speeds["prediction_s"] = seconds * max(1, gradients / size)
        print(
            f"one all-reduce of the gradients of {args.parameters / 1e6:,.0f} M parameters "
            f"({gradients / 1e6:,.0f} MB in fp32) will take about {speeds['prediction_s']:.2f} s"
        )
    for link, seconds in speeds.get("links", {}).items():
        print(f"link {link}: 1 MB in {seconds * 1e3:.1f} ms")
    for note in dict.fromkeys(notes):  # once per host, not once per rank
        print(f"note: {note}")
    for line, cure in dict.fromkeys(problems):
        print(f"PROBLEM: {line}\n    cure: {cure}")
    if not problems:
        hosts = len({report["host"] for report in reports})
        print(f"fit to train: {len(reports)} ranks on {hosts} host{'s' * (hosts > 1)}")
    everything = {"ranks": reports, "clocks": clocks, "speeds": speeds}
    everything |= {"problems": problems, "notes": notes}
    path = args.json or args.save_dir / "check_cluster.json"
    partial = path.with_name(f"{path.name}.{os.getpid()}")  # two preflights may write one at a time
    try:
        partial.write_text(json.dumps(everything, indent=1))
        partial.replace(path)
    except OSError as error:
        print(f"note: no JSON file: {error}")
    sys.stdout.flush()


def parse_args():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, outputs = parser.add_argument, Path(__file__).resolve().parents[1] / "outputs"
    add("--save-dir", type=Path, default=outputs, help="the --save-dir of the training")
    add("--parameters", type=float, default=124e6, help="size of the model to be trained")
    add("--largest", type=float, default=2**26, help="bytes of the largest all-reduce timed")
    add("--timeout", type=int, default=60, help="seconds to wait for the other ranks")
    add("--json", type=Path, help="the report; None: SAVE_DIR/check_cluster.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
