"""What launching kernels costs: one thread alone, several at once, beside small tasks.

    python benchmarks/launching.py [--devices cuda:0,cuda:1] [--layers 300] [--kernels 24]

A thread for each device launches layers of so many small kernels. It is what the executor's threads
do, without the GPUs' work: they are never what is waited for. Beside them other threads do what
lanes of transfers do: mark, wait, copy a little, mark. Prints microseconds a kernel, the median and
the ninth decile of a layer, and of a small task, of which there are about so many a second. Without
a GPU the CPU stands for it.
"""

import argparse
import sys
import threading
import time
from statistics import median, quantiles

import torch
from about import about
from torch import Tensor

from roundel.executor.short_turns import SWITCH_S
from roundel.executor.streams import make_stream


def launch(device: torch.device, arguments: argparse.Namespace, times: list[float]) -> None:
    """Launch layers; their times in microseconds go to `times`."""
    stream, value = make_stream(device), torch.ones(64, 64, device=device)
    with stream.use(), torch.no_grad():
        for number in range(arguments.layers):
            start = time.perf_counter()
            for _ in range(arguments.kernels):
                value = value * 1.0
            times.append((time.perf_counter() - start) * 1e6)
            if number % 16 == 15:
                stream.record().block()


def do_small_tasks(
    device: torch.device, stop: threading.Event, pause_s: float, times: list[float]
) -> None:
    """What a lane of transfers does, again and again."""
    stream = make_stream(device)
    source: Tensor = torch.ones(1024, device=device)
    with stream.use():
        before = stream.record()
        while not stop.wait(pause_s):
            start = time.perf_counter()
            stream.wait(before)
            stream.record()
            for _ in range(4):
                target = torch.empty_like(source)
                stream.reads(target)
                target.copy_(source, non_blocking=True)
            before = stream.record()
            times.append((time.perf_counter() - start) * 1e6)


def tried(arguments: argparse.Namespace, devices: list[torch.device], small: bool) -> str:
    """A row: how long layers and small tasks took."""
    times: list[float] = []
    tasks: list[float] = []
    stop = threading.Event()
    beside = [
        threading.Thread(
            target=do_small_tasks, args=(device, stop, arguments.pause_ms / 1e3, tasks)
        )
        for device in devices
        for _ in range(arguments.lanes if small else 0)
    ]
    threads = [
        threading.Thread(target=launch, args=(device, arguments, times)) for device in devices
    ]
    start = time.perf_counter()
    for each in [*beside, *threads]:
        each.start()
    for each in threads:
        each.join()
    seconds = time.perf_counter() - start
    stop.set()
    for each in beside:
        each.join()
    kernels = arguments.layers * arguments.kernels * len(devices)
    row = f"{seconds * 1e6 / kernels:8.1f} {_spread(times)}"
    return f"{row} {len(tasks) / seconds:9,.0f} {_spread(tasks)}" if len(tasks) > 1 else row


def _spread(times: list[float]) -> str:
    return f"{median(times):9.0f} {quantiles(times, n=10)[-1]:9.0f}"


def main() -> None:
    """Every way, and again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cpu,cpu"
    parser.add_argument("--devices", default=default)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--kernels", type=int, default=24, help="in a layer")
    parser.add_argument("--lanes", type=int, default=3, help="threads of small tasks, a device")
    parser.add_argument("--pause-ms", type=float, default=2, help="of them between two tasks")
    arguments = parser.parse_args()
    devices = [torch.device(name) for name in arguments.devices.split(",")]
    about()
    print(f"{'':40} us/kernel    median      9/10   tasks/s    median      9/10")
    sys.setswitchinterval(SWITCH_S)
    ways = [
        ("one thread", devices[:1], False),
        ("one, small tasks beside", devices[:1], True),
        ("all at once", devices, False),
        ("all at once, small tasks beside", devices, True),
    ]
    for repeat in range(2):
        for name, places, small in ways:
            row = tried(arguments, places, small)
            print(f"{name:40} {row}", flush=True) if repeat else None


if __name__ == "__main__":
    main()
