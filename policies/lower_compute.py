"""Lowering, the ops themselves: a task per op, what it saves and what it needs while it runs."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints
from .builder import ProgramBuilder
from .flows import keeps_saved, last_backward
from .order import Order
from .table import OpTable


def lower_compute(builder: ProgramBuilder, table: OpTable, order: Order) -> None:
    """Add task number r for row r of the table, its saved tensors and its workspace."""
    count = len(table.kind)
    builder.tasks(
        count,
        kind=table.kind,
        lane=builder.lane(table.device, "compute"),
        first=table.first,
        stop=table.stop,
        microbatch=table.microbatch,
        step=table.step,
        duration_ns=table.duration_ns,
        source=table.device,
        target=table.device,
        key=order.rank,
    )
    saving = keeps_saved(table)
    saved = over_ranges(table, saving, _saved_bytes)
    done = last_backward(table, saving)
    builder.buffers(
        "saved activations", table.first[saving], table.device[saving], saved, saving, done
    )
    _lower_workspace(builder, table)


def _lower_workspace(builder: ProgramBuilder, table: OpTable) -> None:
    rows = np.arange(len(table.kind))
    working = over_ranges(table, rows, _workspace_bytes)
    forgets = np.flatnonzero(table.forgets)
    working[forgets] = over_ranges(table, forgets, _forgetful_bytes)
    builder.buffers("workspace", table.first, table.device, working, rows, rows)


def over_ranges(
    table: OpTable, rows: Ints, measure: Callable[[OpTable, int, int], int]
) -> NDArray[np.int64]:
    """`measure(table, first, stop)` for the layers of each row, computed once a distinct range."""
    layers = table.work.layers + 1
    key = table.first[rows].astype(np.int64) * layers + table.stop[rows]
    ranges, which = np.unique(key, return_inverse=True)
    values = [measure(table, *divmod(int(each), layers)) for each in ranges]
    return np.array(values, dtype=np.int64)[which] if values else np.zeros(0, dtype=np.int64)


def _saved_bytes(table: OpTable, first: int, stop: int) -> int:
    """All that a range keeps for backward: saved tensors, and outputs that feed its own layers."""
    saved = table.work.layer_bytes("saved_bytes")[first:stop].sum()
    return int(saved + table.work.layer_bytes("output_bytes")[first : stop - 1].sum())


def _workspace_bytes(table: OpTable, first: int, stop: int) -> int:
    return int(table.work.layer_bytes("workspace_bytes")[first:stop].max())


def _forgetful_bytes(table: OpTable, first: int, stop: int) -> int:
    """What a forward without saving needs at most: one layer's tensors at a time."""
    fields = ("saved_bytes", "output_bytes", "workspace_bytes")
    each = sum(table.work.layer_bytes(field)[first:stop] for field in fields)
    return int(np.max(each))
