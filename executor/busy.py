"""GPUs that are kept as busy as a step keeps them, while something beside them is measured."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .measure_links import COPY_BYTES, Copy, make_copy
from .places import gpus_of

SIDE = 2048
LAUNCHES = 60
"""Kernels in a row, as many as a decoder's block has."""


@contextmanager
def kept_busy(devices: Sequence[torch.device]) -> Iterator[None]:
    """Each GPU computes and copies both ways in here, by a thread of its own; the CPU does not."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=_work, args=(gpu, stop), daemon=True) for gpu in gpus_of(devices)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _work(gpu: torch.device, stop: threading.Event) -> None:
    host = torch.device("cpu")
    value = torch.zeros(SIDE, SIDE, device=gpu, dtype=torch.bfloat16)
    copies: list[Copy] = [make_copy(*way, COPY_BYTES) for way in ((host, gpu), (gpu, host))]
    stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        while not stop.is_set():
            for copy in copies:
                copy()
            for _ in range(LAUNCHES):
                value = value @ value
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
            done.synchronize()
    torch.cuda.synchronize(gpu)
