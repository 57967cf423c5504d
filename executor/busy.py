"""GPUs that are kept as busy as a step keeps them, while something beside them is measured."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from .measure_links import COPY_BYTES, Copy, make_copy
from .places import gpus_of

SIDE = 2048
LAUNCHES = 480
"""Kernels in a row, as many as a few of a decoder's blocks have, for each piece copied.

A step of round-robin with updates on the host copies so much. Copies without a pause take so much
of the host's memory that an update beside them is nearly twice as slow as in a step.
"""


@contextmanager
def kept_busy(devices: Sequence[torch.device]) -> Iterator[None]:
    """Each GPU computes and copies both ways in here, by a thread of its own; the CPU does not.

    Raises what goes wrong there.
    """
    gpus, stop = sorted(gpus_of(devices), key=str), threading.Event()
    with ThreadPoolExecutor(max(1, len(gpus))) as pool:
        begun = [threading.Event() for _ in gpus]
        works = [pool.submit(_work, gpu, stop, each) for gpu, each in zip(gpus, begun, strict=True)]
        try:
            for each in begun:
                each.wait()
            yield
        finally:
            stop.set()
    for work in works:
        work.result()


def _work(gpu: torch.device, stop: threading.Event, begun: threading.Event) -> None:
    try:
        rounds = _rounds(gpu)
        next(rounds)
        begun.set()
        while not stop.is_set():
            next(rounds)
    finally:
        begun.set()


def _rounds(gpu: torch.device) -> Iterator[None]:
    """Copies and kernels, again and again, and each time until the GPU has done them."""
    host = torch.device("cpu")
    value = torch.zeros(SIDE, SIDE, device=gpu, dtype=torch.bfloat16)
    copies: list[Copy] = [make_copy(*way, COPY_BYTES) for way in ((host, gpu), (gpu, host))]
    stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
    while True:
        with torch.cuda.stream(stream):
            for copy in copies:
                copy()
            for _ in range(LAUNCHES):
                value = value @ value
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
            done.synchronize()
        yield
