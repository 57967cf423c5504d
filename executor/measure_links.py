"""The links of a machine: each alone, both ways at once, and all devices at once."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..traces.machine import HOST, Link
from ..traces.trace import MAX_COUNT

COPY_BYTES = 64 * 2**20
LARGE_BYTES = 4 * COPY_BYTES
"""Long enough that copies which are launched one after the other run at once."""

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


class Together(NamedTuple):
    """What all devices at once get of the host's memory: bytes per second up, and both ways."""

    up: int
    both: int


def all_at_once(places: Sequence[torch.device]) -> Together | None:
    """What GPUs get together; None where not all places are GPUs."""
    if any(place.type != "cuda" for place in places):
        return None
    host = torch.device("cpu")
    ups = [make_copy(host, place, LARGE_BYTES) for place in places]
    downs = [make_copy(place, host, LARGE_BYTES) for place in places]
    return Together(*(_rate(copies, places) for copies in (ups, ups + downs)))


def _rate(copies: Sequence[Copy], places: Sequence[torch.device]) -> int:
    return len(copies) * LARGE_BYTES * 1_000_000_000 // max(1, shortest_ns(copies, places))


def behind_one_channel(links: list[Link], together: Together | None) -> list[Link]:
    """Links from the host, with one before them that all share where together they get less.

    It has both directions at once where devices that copy both ways get twice what they get up.
    `together` None: not known; they share nothing.
    """
    duplex = all(link.duplex for link in links)
    alone = sum(link.bytes_per_s for link in links)
    if together is None:
        return links
    up = min(together.up, alone)
    both_ways = duplex and together.both >= 2 * SHARES * up
    if up >= SHARES * alone and both_ways == duplex:
        return links
    rate = up if both_ways or not duplex else max(up, together.both)
    shared = Link(a=HOST, b=CHANNEL, bytes_per_s=rate, duplex=both_ways)
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
    return min([time_ns(copies, devices) for _ in range(REPEATS + 1)][1:])


def time_ns(copies: Sequence[Copy], devices: Sequence[torch.device]) -> int:
    """How long these take together."""
    _wait(devices)
    start = time.perf_counter_ns()
    for copy in copies:
        copy()
    _wait(devices)
    return time.perf_counter_ns() - start


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
