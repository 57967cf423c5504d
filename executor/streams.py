"""What a lane runs on: a CUDA stream, or on the CPU nothing but the calling thread."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .places import gpus_of


class Stream(Protocol):
    """Runs work in order. `record` marks a point in it, `wait` makes it wait for another's mark."""

    def use(self) -> AbstractContextManager[Any]:
        """Work inside goes to this stream."""
        ...

    def record(self) -> "Mark":
        """A mark behind all work so far."""
        ...

    def wait(self, mark: "Mark") -> None:
        """Work from here on starts when `mark` has been reached."""
        ...

    def reads(self, tensor: Tensor) -> None:
        """The memory of `tensor` is not to be reused before this stream is done with it."""
        ...

    def memory(self) -> AbstractContextManager[Any]:
        """Memory taken inside is this stream's; the current stream is to fill it.

        Allocators have some for each stream, and what one has let go of is slow to become
        another's. It waits for what this stream was given before, which may be at work there.
        """
        ...


class Mark(Protocol):
    """A point in a stream's work."""

    def block(self) -> None:
        """Block the calling thread until the point has been reached."""
        ...

    def time_ns(self, clock: "Clock") -> int:
        """When it was reached, in nanoseconds since the clock's start."""
        ...


class CpuMark:
    """A point in a thread's work: reached as soon as it is made."""

    def __init__(self) -> None:
        self.at_ns = time.perf_counter_ns()

    def block(self) -> None:
        """Nothing to wait for."""

    def time_ns(self, clock: "Clock") -> int:
        return self.at_ns - clock.start_ns


class CpuStream:
    """The calling thread."""

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def record(self) -> CpuMark:
        return CpuMark()

    def wait(self, mark: Mark) -> None:
        mark.block()

    def reads(self, tensor: Tensor) -> None:
        """Nothing to do: on the CPU all is done when it is issued."""

    def memory(self) -> AbstractContextManager[Any]:
        return nullcontext()


class CudaMark:
    """A CUDA event."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Whoever waits for it sleeps: a thread that spins takes a core from the optimizer.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self.device = stream.device
        self.event.record(stream)

    def block(self) -> None:
        self.event.synchronize()

    def time_ns(self, clock: "Clock") -> int:
        start = clock.marks[self.device.index].event
        start.synchronize()
        ms: float = start.elapsed_time(self.event)
        return round(ms * 1e6)


class CudaStream:
    """A CUDA stream of its own. `urgent`: its kernels go before those of other streams."""

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        priority = -1 if urgent else 0
        self.stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]

    def use(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def record(self) -> CudaMark:
        return CudaMark(self.stream)

    def wait(self, mark: Mark) -> None:
        if isinstance(mark, CudaMark):
            self.stream.wait_event(mark.event)
        else:
            mark.block()

    def reads(self, tensor: Tensor) -> None:
        tensor.record_stream(self.stream)

    @contextmanager
    def memory(self) -> Iterator[None]:
        fills = torch.cuda.current_stream(self.stream.device)
        with torch.cuda.stream(self.stream):
            yield
        fills.wait_stream(self.stream)


class Clock:
    """The start of a step on the host and on every CUDA device, all at one moment.

    On a device it is a mark on a stream with nothing else on it, of `idle_streams`, which is
    reached whatever runs on the others. A GPU that other processes use, too, may be at their work
    now, so the marks come when all have answered, and nothing begins before they are reached.
    """

    def __init__(self, streams: "IdleStreams") -> None:
        for mark in self._marks(streams).values():
            mark.block()
        self.marks = self._marks(streams)
        self.start_ns = time.perf_counter_ns()
        for mark in self.marks.values():
            mark.block()

    @staticmethod
    def _marks(streams: "IdleStreams") -> dict[int, CudaMark]:
        return {index: CudaMark(stream) for index, stream in streams.items()}


IdleStreams = dict[int, torch.cuda.Stream]
"""A stream by the number of its device."""


def idle_streams(devices: Sequence[torch.device]) -> IdleStreams:
    """A stream for each GPU that nothing runs on. To be kept: torch has few, which take turns."""
    indices = {device.index for device in gpus_of(devices)}
    return {index: CudaStream(torch.device("cuda", index)).stream for index in sorted(indices)}


def mark_now(device: torch.device) -> Mark:
    """A mark behind all work so far on a device's current stream."""
    if device.type == "cuda":
        return CudaMark(torch.cuda.current_stream(device))
    return CpuMark()


def make_stream(device: torch.device, urgent: bool = False) -> Stream:
    """A stream of its own on `device`; `urgent` kernels go before those of other streams."""
    return CudaStream(device, urgent) if device.type == "cuda" else CpuStream()
