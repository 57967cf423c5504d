"""A Timeline: what ran where and when, and what memory was in use. Simulated or measured, alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]

COMPUTE_KINDS = ("F", "B", "I", "W", "R")
TRANSFER_KINDS = ("upload", "download", "send", "offload", "fetch")
KINDS = (*COMPUTE_KINDS, *TRANSFER_KINDS, "update", "norm")
KIND_CODE = {kind: code for code, kind in enumerate(KINDS)}

LaneKind = Literal["compute", "h2d", "d2h", "peer", "optimizer"]
LANE_KINDS: tuple[LaneKind, ...] = ("compute", "h2d", "d2h", "peer", "optimizer")


class Lane(NamedTuple):
    """An in-order queue of tasks, what a CUDA stream is. `device` is -1 on the host."""

    device: int
    kind: LaneKind

    @property
    def name(self) -> str:
        return f"gpu{self.device} {self.kind}" if self.device >= 0 else f"host {self.kind}"


class Span(NamedTuple):
    """One task of a timeline: `layers` [first, stop) of one microbatch in one step."""

    kind: str
    lane: Lane
    first: int
    stop: int
    microbatch: int
    step: int
    nbytes: int
    start_ns: int
    end_ns: int
    exposed_ns: int


@dataclass(frozen=True)
class MemoryCurve:
    """Bytes in use in one memory over time: `used_bytes[i]` from `time_ns[i]` on.

    `limit_bytes` 0 means no limit. `holders` are the largest holders at the peak, largest first.
    """

    name: str
    limit_bytes: int
    time_ns: Ints
    used_bytes: Ints
    peak_bytes: int
    peak_ns: int
    holders: tuple[tuple[str, int], ...] = ()

    @property
    def over_bytes(self) -> int:
        """By how much the peak is over the limit; 0 where it fits."""
        return max(0, self.peak_bytes - self.limit_bytes) if self.limit_bytes else 0

    @property
    def over_share(self) -> float:
        """By what part of the limit the peak is over it."""
        return self.over_bytes / self.limit_bytes if self.limit_bytes else 0.0


@dataclass(frozen=True)
class Timeline:
    """Spans in columns, one row a task, and memory over time.

    `kind` holds codes (`KINDS[code]`), `lane` indexes `lanes`; a transfer has the microbatch -1
    where it belongs to none. `exposed_ns` is how long the task's lane stood idle before it only
    because a transfer that the task waits for was still under way. `memory` has one curve per
    device, in order, and the host's last.
    """

    name: str
    source: Literal["simulated", "measured"]
    devices: int
    microbatches: int
    steps: int
    microbatch_tokens: int
    lanes: tuple[Lane, ...]
    kind: Ints
    lane: Ints
    first: Ints
    stop: Ints
    microbatch: Ints
    step: Ints
    nbytes: Ints
    start_ns: Ints
    end_ns: Ints
    exposed_ns: Ints
    memory: tuple[MemoryCurve, ...]

    def __len__(self) -> int:
        return len(self.start_ns)

    def spans(self) -> Iterator[Span]:
        """The rows as Span values, in the order of the columns."""
        columns = (self.first, self.stop, self.microbatch, self.step, self.nbytes)
        times = (self.start_ns, self.end_ns, self.exposed_ns)
        rows = zip(self.kind.tolist(), self.lane.tolist(), strict=True)
        numbers = zip(*(column.tolist() for column in (*columns, *times)), strict=True)
        for (kind, lane), row in zip(rows, numbers, strict=True):
            yield Span(KINDS[kind], self.lanes[lane], *row)

    @property
    def makespan_ns(self) -> int:
        """The last end, counted from 0."""
        return int(self.end_ns.max()) if len(self) else 0

    @property
    def is_compute(self) -> NDArray[np.bool_]:
        """Which rows run on a compute lane."""
        compute = np.array([lane.kind == "compute" for lane in self.lanes])
        return compute[self.lane]

    @property
    def fits(self) -> bool:
        """Whether every memory stays within its limit."""
        return not any(curve.over_bytes for curve in self.memory)
