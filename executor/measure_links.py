"""The links of a machine: each alone, both ways at once, and all devices at once."""

import time
from collections.abc import Callable, Sequence

import torch

from ..traces.machine import HOST, Link
from ..traces.trace import MAX_COUNT

COPY_BYTES = 64 * 2**20
SMALL_BYTES = 1024
REPEATS = 3

CHANNEL = "host memory"
"""The node behind which all devices share the way to the host."""

SHARES = 0.9
"""Devices that together get less than this of what each gets alone share something."""

Copy = Callable[[], object]


def measured_link(a: str, b: str, source: torch.device, target: torch.device) -> Link:
    """The link between two places: its slower direction, and whether it has both at once."""
    latency_ns = shortest_ns([make_copy(source, target, SMALL_BYTES)], (source, target))
    there, back = make_copy(source, target, COPY_BYTES), make_copy(target, source, COPY_BYTES)
    alone_ns = max(shortest_ns([each], (source, target)) for each in (there, back))
    # Where both ways share, together they take twice as long.
    # Between host and itself there is nothing to share, and no stream to copy beside another.
    duplex = source == target or shortest_ns([there, back], (source, target)) < 1.5 * alone_ns
    copy_ns = max(1, alone_ns - latency_ns)
    rate = min(max(1, COPY_BYTES * 1_000_000_000 // copy_ns), MAX_COUNT)
    return Link(a=a, b=b, bytes_per_s=rate, latency_ns=latency_ns, duplex=duplex)


def all_at_once_bytes_per_s(places: Sequence[torch.device]) -> int:
    """What all devices together get from the host; 0 where there are not several GPUs."""
    if len(places) < 2 or any(place.type != "cuda" for place in places):
        return 0
    copies = [make_copy(torch.device("cpu"), place, COPY_BYTES) for place in places]
    return len(places) * COPY_BYTES * 1_000_000_000 // max(1, shortest_ns(copies, places))


def behind_one_channel(links: list[Link], together_bytes_per_s: int) -> list[Link]:
    """Links from the host, with one before them that all share where together they get less.

    `together_bytes_per_s` 0: not known; they share nothing.
    """
    alone = sum(link.bytes_per_s for link in links)
    if not together_bytes_per_s or together_bytes_per_s >= SHARES * alone:
        return links
    duplex = all(link.duplex for link in links)
    shared = Link(a=HOST, b=CHANNEL, bytes_per_s=together_bytes_per_s, duplex=duplex)
    return [shared, *(link.model_copy(update={"a": CHANNEL}) for link in links)]


def make_copy(source: torch.device, target: torch.device, nbytes: int) -> Copy:
    """A copy on a stream of its own, as lanes have it."""
    gpu = next((each for each in (source, target) if each.type == "cuda"), None)
    value, place = (
        torch.zeros(
            nbytes,
            dtype=torch.uint8,
            device=each,
            pin_memory=gpu is not None and each.type == "cpu",
        )
        for each in (source, target)
    )
    if gpu is None:
        return lambda: place.copy_(value)
    stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]

    def copy() -> None:
        with torch.cuda.stream(stream):
            place.copy_(value, non_blocking=True)

    return copy


def shortest_ns(copies: Sequence[Copy], devices: Sequence[torch.device]) -> int:
    """The shortest time of these together, of some runs after a first one."""
    return min(times_ns(copies, devices, REPEATS))


def times_ns(copies: Sequence[Copy], devices: Sequence[torch.device], repeats: int) -> list[int]:
    """The times of these together, of so many runs after a first one."""
    times = []
    for _ in range(repeats + 1):
        _wait(devices)
        start = time.perf_counter_ns()
        for copy in copies:
            copy()
        _wait(devices)
        times.append(time.perf_counter_ns() - start)
    return times[1:]


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
