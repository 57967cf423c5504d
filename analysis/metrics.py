"""The figures of one timeline: step time, bubble, memory, throughput."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..traces.timeline import Timeline
from .idle import ComputeRows, IdleTime, Longs, idle_time

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Bubble:
    """The parts of the bubble ratio: idle shares of devices x makespan, 0 to 1."""

    fill: float = 0.0
    switch: float = 0.0
    drain: float = 0.0
    steady: float = 0.0


@dataclass(frozen=True)
class Metrics:
    """What one timeline comes to: seconds, bytes and shares from 0 to 1.

    `step_s` is the steady time of a step (see `step_ns`). `bubble_ratio` is the idle share of the
    compute lanes up to the makespan, and the sum of the four parts of `bubble`;
    `bubble_ratio_span` sets mean busy time against the longest device's own last end minus first
    start. `exposed_transfer_s` is how long a device stood idle only for transfers, on average.
    `peak_memory_bytes` has one figure a device; memory that was not recorded counts 0.
    """

    devices: int
    microbatches: int
    steps: int
    makespan_s: float
    step_s: float
    bubble_ratio: float
    bubble_ratio_span: float
    bubble: Bubble
    exposed_transfer_s: float
    peak_memory_bytes: tuple[int, ...]
    peak_host_memory_bytes: int
    fits: bool
    microbatches_per_s: float
    tokens_per_s: float

    def to_json(self, policy: str) -> dict[str, Any]:
        """The object that `--json` prints for `policy`; docs/formats.md lists the keys."""
        bubble = self.bubble
        return {
            "policy": policy,
            "devices": self.devices,
            "microbatches": self.microbatches,
            "steps": self.steps,
            "makespan_s": self.makespan_s,
            "step_s": self.step_s,
            "bubble_ratio": self.bubble_ratio,
            "bubble_ratio_span": self.bubble_ratio_span,
            "bubble": {
                "fill": bubble.fill,
                "switch": bubble.switch,
                "drain": bubble.drain,
                "steady": bubble.steady,
            },
            "exposed_transfer_s": self.exposed_transfer_s,
            "peak_memory_bytes": list(self.peak_memory_bytes),
            "peak_host_memory_bytes": self.peak_host_memory_bytes,
            "fits": self.fits,
            "microbatches_per_s": self.microbatches_per_s,
            "tokens_per_s": self.tokens_per_s,
        }


def measure(timeline: Timeline) -> Metrics:
    """The metrics of `timeline`, simulated or measured. Four million rows take under a second."""
    rows = ComputeRows.of(timeline)
    idle = idle_time(rows)
    whole_ns = timeline.devices * timeline.makespan_ns
    step_s = step_ns(timeline.steps, rows.step_ends_ns(), timeline.makespan_ns) / NS_PER_S
    peaks = [curve.peak_bytes for curve in timeline.memory]
    per_s = timeline.microbatches / step_s if step_s > 0 else 0.0
    return Metrics(
        devices=timeline.devices,
        microbatches=timeline.microbatches,
        steps=timeline.steps,
        makespan_s=timeline.makespan_ns / NS_PER_S,
        step_s=step_s,
        bubble_ratio=_share(sum(idle), whole_ns),
        bubble_ratio_span=_span_ratio(rows, whole_ns - sum(idle)),
        bubble=_bubble(idle, whole_ns),
        exposed_transfer_s=_exposed_ns(timeline) / timeline.devices / NS_PER_S,
        peak_memory_bytes=tuple(peaks[: timeline.devices]) or (0,) * timeline.devices,
        peak_host_memory_bytes=peaks[-1] if len(peaks) > timeline.devices else 0,
        fits=timeline.fits,
        microbatches_per_s=per_s,
        tokens_per_s=per_s * timeline.microbatch_tokens,
    )


def step_ns(steps: int, step_ends_ns: Longs, makespan_ns: int) -> float:
    """The steady time of a step: the makespan of a single one, else the pace of the later half.

    `step_ends_ns[k]` is the last end of step k's compute. With K steps and j = (K-1)//2 the pace
    is (end[K-1] - end[j]) / (K-1-j): one interval for two steps, two for four, four for eight.
    """
    if steps < 2 or len(step_ends_ns) < steps:
        return float(makespan_ns)
    first = (steps - 1) // 2
    return float(step_ends_ns[steps - 1] - step_ends_ns[first]) / (steps - 1 - first)


def winner(metrics: Mapping[str, Metrics]) -> str | None:
    """The policy with the shortest step of those that fit in memory; the first of equals.

    None where nothing fits.
    """
    fitting = [policy for policy, figures in metrics.items() if figures.fits]
    return min(fitting, key=lambda policy: metrics[policy].step_s, default=None)


def _share(part_ns: int, whole_ns: int) -> float:
    return part_ns / whole_ns if whole_ns else 0.0


def _bubble(idle: IdleTime, whole_ns: int) -> Bubble:
    return Bubble(
        fill=_share(idle.fill_ns, whole_ns),
        switch=_share(idle.switch_ns, whole_ns),
        drain=_share(idle.drain_ns, whole_ns),
        steady=_share(idle.steady_ns, whole_ns),
    )


def _span_ratio(rows: ComputeRows, busy_ns: int) -> float:
    longest_ns = int(rows.spans_ns().max(initial=0))
    return 1 - busy_ns / rows.devices / longest_ns if longest_ns else 0.0


def _exposed_ns(timeline: Timeline) -> int:
    if not len(timeline):
        return 0
    return int(timeline.exposed_ns[timeline.is_compute].sum(dtype=np.int64))
