"""Timelines and metrics as pandas frames, and as CSV."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..traces.timeline import KINDS, Timeline
from .files import output_path, writing
from .metrics import Metrics


def spans_frame(timeline: Timeline) -> pd.DataFrame:
    """One row a task: kind, lane, device (-1: host), layers, microbatch, step, bytes, times in ns.

    `kind` and `lane` are categories; the rows are in the timeline's order.
    """
    device = np.array([lane.device for lane in timeline.lanes], dtype=np.int64)
    names = [lane.name for lane in timeline.lanes]
    columns = {
        "kind": pd.Categorical.from_codes(timeline.kind, pd.Index(KINDS)),
        "lane": pd.Categorical.from_codes(timeline.lane, pd.Index(names)),
        "device": device[timeline.lane.astype(np.intp)],
        "first": timeline.first,
        "stop": timeline.stop,
        "microbatch": timeline.microbatch,
        "step": timeline.step,
        "bytes": timeline.nbytes,
        "start_ns": timeline.start_ns,
        "end_ns": timeline.end_ns,
        "exposed_ns": timeline.exposed_ns,
    }
    return pd.DataFrame(columns)


def memory_frame(timeline: Timeline) -> pd.DataFrame:
    """One row a change: memory (its name), time_ns, used_bytes, limit_bytes (0: no limit)."""
    sizes = [len(curve.time_ns) for curve in timeline.memory]
    names = pd.Index([curve.name for curve in timeline.memory])
    limits = np.array([curve.limit_bytes for curve in timeline.memory], dtype=np.int64)
    columns = {
        "memory": pd.Categorical.from_codes(np.repeat(np.arange(len(sizes)), sizes), names),
        "time_ns": _joined([curve.time_ns for curve in timeline.memory]),
        "used_bytes": _joined([curve.used_bytes for curve in timeline.memory]),
        "limit_bytes": np.repeat(limits, sizes),
    }
    return pd.DataFrame(columns)


def metrics_frame(metrics: Mapping[str, Metrics]) -> pd.DataFrame:
    """One row a policy, which is the index; the columns are `--json`'s.

    The bubble's parts are `bubble_fill` and so on, and `peak_memory_bytes` is the largest
    device's.
    """
    rows = [_flat(policy, figures) for policy, figures in metrics.items()]
    return pd.DataFrame(rows).set_index("policy") if rows else pd.DataFrame()


def write_csv(timeline: Timeline, path: str | Path) -> None:
    """Write `spans_frame` as CSV (compressed when the name ends in .gz). Raises InputError."""
    path = output_path(path, "CSV")
    with writing(path, "CSV"):
        spans_frame(timeline).to_csv(path, index=False, lineterminator="\n")


def _joined(arrays: list[np.typing.NDArray[np.integer]]) -> np.typing.NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays]).astype(np.int64)


def _flat(policy: str, metrics: Metrics) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in metrics.to_json(policy).items():
        if key == "bubble":
            flat |= {f"bubble_{part}": share for part, share in value.items()}
        else:
            flat[key] = max(value) if key == "peak_memory_bytes" else value
    return flat
