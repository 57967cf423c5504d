"""How fast the host updates parameters, alone and beside GPUs that compute and copy.

    python benchmarks/host_rate.py [--devices cuda:0] [--seconds 1]

One rate stands for a whole profile. Measures it as `roundel profile` does, again and again, for
masters of float32 and of bfloat16 with bf16 compute, beside GPUs that compute `LAUNCHES` kernels
for each piece that they copy (`executor/busy.py`) and more, and by several numbers of threads.
Prints billions of parameters a second, median and mean. Without a GPU nothing is beside.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from about import about
from training_common import devices_of

from roundel.executor import busy
from roundel.executor.measure_machine import SIDE, SQUARES, _update, times_in_turn_ns
from roundel.executor.places import threads, threads_of_updates

HOST = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-4, fused=True)


def rates(masters: torch.dtype, seconds: float) -> str:
    """Updates of some squares in turn, for so long."""
    update = partial(_update, ADAMW, torch.bfloat16, masters, HOST)
    times = times_in_turn_ns(update, SQUARES, seconds)
    usual, mean = (SIDE**2 / each for each in (median(times), sum(times) / len(times)))
    return f"{usual:8.2f} {mean:8.2f}"


def main() -> None:
    """One condition after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--devices", default=default)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    devices = devices_of(arguments)
    about()
    print(f"{'':36} {'median':>8} {'mean':>8}")
    usual = busy.LAUNCHES
    for masters in (torch.float32, torch.bfloat16):
        for launches in (0, usual, 2 * usual, 4 * usual, 0, usual):
            busy.LAUNCHES = launches
            beside = busy.kept_busy(devices) if launches else nullcontext()
            with threads(threads_of_updates(devices)), beside:
                name = f"{masters}, {launches} kernels beside".removeprefix("torch.")
                print(f"{name:36} {rates(masters, arguments.seconds)}", flush=True)
    for count in (8, 12, 14, 16):
        with threads(count):
            name = f"float32, alone, {count} threads"
            print(f"{name:36} {rates(torch.float32, arguments.seconds)}", flush=True)


if __name__ == "__main__":
    main()
