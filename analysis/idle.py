"""Where the compute lanes stand idle, and why: fill, switch, steady or drain."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import COMPUTE_KINDS, KIND_CODE, Timeline

Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]

_OPS = np.array([code for kind, code in KIND_CODE.items() if kind in COMPUTE_KINDS])
_RECOMPUTE = np.array([KIND_CODE["R"]])
_BACKWARD = np.array([KIND_CODE[kind] for kind in "BIW"])


class IdleTime(NamedTuple):
    """Device-nanoseconds of idle compute lanes, by their reason; they sum to all idle time."""

    fill_ns: int
    switch_ns: int
    drain_ns: int
    steady_ns: int


@dataclass(frozen=True)
class ComputeRows:
    """The rows on compute lanes, device after device, each device's in the order of their starts.

    `is_op` marks F, B, I, W and R; the other rows are updates and norms. `is_recompute` marks R,
    `is_backward` B, I and W.
    """

    devices: int
    makespan_ns: int
    device: Longs
    step: Longs
    start_ns: Longs
    end_ns: Longs
    is_op: Flags
    is_recompute: Flags
    is_backward: Flags

    @classmethod
    def of(cls, timeline: Timeline) -> "ComputeRows":
        """The compute rows of `timeline`."""
        device_of_lane = np.array([lane.device for lane in timeline.lanes], dtype=np.int64)
        rows = np.flatnonzero(timeline.is_compute) if len(timeline) else np.empty(0, np.intp)
        device = device_of_lane[timeline.lane[rows]]
        start = timeline.start_ns[rows].astype(np.int64)
        order = _order(device * (timeline.makespan_ns + 1) + start)
        rows = rows[order]
        kind = timeline.kind[rows]
        return cls(
            devices=timeline.devices,
            makespan_ns=timeline.makespan_ns,
            device=device[order],
            step=timeline.step[rows].astype(np.int64),
            start_ns=start[order],
            end_ns=timeline.end_ns[rows].astype(np.int64),
            is_op=_among(_OPS)[kind],
            is_recompute=_among(_RECOMPUTE)[kind],
            is_backward=_among(_BACKWARD)[kind],
        )

    def __len__(self) -> int:
        return len(self.start_ns)

    def step_ends_ns(self) -> Longs:
        """The last end of each step's ops over all devices; 0 for a step without ops."""
        ends = np.zeros(int(self.step.max(initial=0)) + 1, dtype=np.int64)
        np.maximum.at(ends, self.step[self.is_op], self.end_ns[self.is_op])
        return ends

    def spans_ns(self) -> Longs:
        """Each device's last end minus its first start; 0 for a device that does nothing."""
        first = np.full(self.devices, self.makespan_ns, dtype=np.int64)
        last = np.zeros(self.devices, dtype=np.int64)
        np.minimum.at(first, self.device, self.start_ns)
        np.maximum.at(last, self.device, self.end_ns)
        spans: Longs = np.maximum(last - first, 0)
        return spans


def idle_time(rows: ComputeRows) -> IdleTime:
    """Every idle nanosecond of the compute lanes from 0 to the makespan, by its reason.

    Before a device's first op: fill; after its last: drain. A gap between a device's last op of
    one step and its first of a later one is split where the earlier step ends on all devices:
    drain before, fill after. The gaps before a step's first backward (B, I or W) on a device and
    before the recomputes ahead of it are the switch, unless they are one of these already.
    Everything else is steady. An update or norm on a compute lane is busy time, and no op. A device
    that does nothing fills.
    """
    if not len(rows):
        return IdleTime(rows.devices * rows.makespan_ns, 0, 0, 0)
    idle_from, tail = _idle_from(rows)
    gap = np.maximum(rows.start_ns - idle_from, 0)
    at = np.flatnonzero(gap)
    before, after = _neighbours(rows, at)
    filling, draining = before < 0, (before >= 0) & (after < 0)
    boundary = _is_boundary(rows, before, after)
    switch = _until_backward(rows)[at] & ~(filling | draining | boundary)
    drained = _before_step_end(rows, before, idle_from[at], gap[at])
    fill = _total(gap[at], filling) + _total(gap[at] - drained, boundary)
    drain = _total(gap[at], draining) + _total(drained, boundary)
    idle_devices = np.bincount(rows.device, minlength=rows.devices) == 0
    fill, drain = fill + _total(tail, idle_devices), drain + _total(tail, ~idle_devices)
    steady = int(gap.sum() + tail.sum()) - fill - drain - _total(gap[at], switch)
    return IdleTime(fill, _total(gap[at], switch), drain, steady)


def _order(key: Longs) -> NDArray[np.intp]:
    # Most timelines come sorted by lane and start; looking costs far less than sorting.
    if np.all(key[1:] >= key[:-1]):
        return np.arange(len(key))
    return np.argsort(key, kind="stable")


def _among(codes: NDArray[np.int_]) -> Flags:
    table = np.zeros(len(KIND_CODE), dtype=np.bool_)
    table[codes] = True
    return table


def _total(amount: Longs, where: Flags) -> int:
    return int(amount[where].sum())


def _idle_from(rows: ComputeRows) -> tuple[Longs, Longs]:
    """Up to when the device was busy before each row, and each device's idle time at its end."""
    # Device d lives in [d*stride, (d+1)*stride): one running maximum serves all devices.
    stride = rows.makespan_ns + 1
    base = rows.device * stride
    busy_until = np.maximum.accumulate(base + rows.end_ns)
    idle_from = np.maximum(np.concatenate(([0], busy_until[:-1])), base) - base
    last = np.zeros(rows.devices, dtype=np.int64)
    np.maximum.at(last, rows.device, rows.end_ns)
    return idle_from, rows.makespan_ns - last


def _neighbours(rows: ComputeRows, at: NDArray[np.intp]) -> tuple[Longs, Longs]:
    """For each row of `at` the op before it and the op at or after it on its device; -1: none."""
    ops = np.flatnonzero(rows.is_op)
    if not len(ops):
        return np.full(len(at), -1), np.full(len(at), -1)
    place = np.searchsorted(ops, at)
    before = np.where(place > 0, ops[np.maximum(place - 1, 0)], -1)
    after = np.where(place < len(ops), ops[np.minimum(place, len(ops) - 1)], -1)
    device = rows.device[at]
    before = np.where(rows.device[before] == device, before, -1)
    return before, np.where(rows.device[after] == device, after, -1)


def _is_boundary(rows: ComputeRows, before: Longs, after: Longs) -> Flags:
    """Which gaps lie between a device's last op of a step and its first op of a later step."""
    last_of_step = _first_of_step(rows, rows.is_op, from_the_end=True)
    first_of_step = _first_of_step(rows, rows.is_op)
    there = (before >= 0) & (after >= 0)
    later = rows.step[after] > rows.step[before]
    return there & later & last_of_step[before] & first_of_step[after]


def _first_of_step(rows: ComputeRows, among: Flags, from_the_end: bool = False) -> Flags:
    """The first (or last) row of each device and step among the rows marked in `among`."""
    where = np.flatnonzero(among)
    where = where if from_the_end else where[::-1]
    steps = int(rows.step.max()) + 1
    chosen = np.full(rows.devices * steps, -1, dtype=np.int64)
    # Of several values for one place numpy keeps the last one written.
    chosen[rows.device[where] * steps + rows.step[where]] = where
    flags = np.zeros(len(rows), dtype=np.bool_)
    flags[chosen[chosen >= 0]] = True
    return flags


def _until_backward(rows: ComputeRows) -> Flags:
    """Each device's first backward of a step, and its recomputes before that."""
    first = np.flatnonzero(_first_of_step(rows, rows.is_backward))
    place = rows.device * (int(rows.step.max()) + 1) + rows.step
    last = np.full(int(place.max()) + 1, len(rows), dtype=np.int64)
    last[place[first]] = first
    early = np.arange(len(rows)) <= last[place]
    return np.asarray(early & (rows.is_recompute | rows.is_backward))


def _before_step_end(rows: ComputeRows, before: Longs, idle_from: Longs, gap: Longs) -> Longs:
    """How much of each gap lies before the end, on all devices, of the step of the op before."""
    drained: Longs = np.clip(rows.step_ends_ns()[rows.step[before]] - idle_from, 0, gap)
    return drained
