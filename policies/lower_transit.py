"""Lowering: updates on a device that a layer's states pass through."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..traces.errors import InputError
from ..traces.timeline import KIND_CODE, Ints
from .builder import ProgramBuilder
from .made_gradients import (
    Made,
    device_rate,
    download_gradients,
    earliest_of,
    hold_gradients,
    hold_room,
    is_tied,
    update_ns,
)
from .order import Order
from .table import OpTable
from .updated import Updated
from .visits import Visits


def update_in_transit(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    made: Made,
    updated: Updated,
) -> None:
    """The last visit that makes a layer's gradient updates it, with its state passing through.

    Earlier visits' gradients wait on the host and come along. Two layers' states are on a device
    at a time.
    """
    if is_tied(table).any():
        raise InputError(
            "layers that share parameters need optimizer_on host where weights are streamed"
        )
    cells, which = np.unique(made.cell, return_inverse=True)
    last = earliest_of(-order.rank[made.last_grad], which, len(cells))
    final = np.zeros(len(made.cell), dtype=np.bool_)
    final[last] = True
    updated.visit.reshape(-1)[cells] = made.visit[last]
    partial = made.rows(np.flatnonzero(~final))
    downloads = download_gradients(builder, table, order, partial)
    ends = made.rows(np.flatnonzero(final))
    turn = _turns(ends.visit)
    before = np.full((2, len(visits.step)), -1, dtype=np.int64)
    for number in range(int(turn.max(initial=-1)) + 1):
        batch = ends.rows(np.flatnonzero(turn == number))
        gate = before[number % 2][batch.visit]
        updates = _pass_through(builder, table, visits, order, batch, gate, partial, downloads)
        before[number % 2][batch.visit] = updates[0]
        updated.task.reshape(-1)[batch.cell] = updates[1]


def _turns(visit: Ints) -> Ints:
    """Each row's number within its visit."""
    starts = np.flatnonzero(np.diff(visit, prepend=-1))
    sizes = np.diff(np.append(starts, len(visit)))
    return np.arange(len(visit)) - np.repeat(starts, sizes)


def _pass_through(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    batch: Made,
    gate: Ints,
    partial: Made,
    downloads: Ints,
) -> tuple[Ints, Ints]:
    """State up, update, state and weights down, for one layer a visit. Returns (update, down)."""
    bytes_of = table.work.layer_bytes
    state = bytes_of("optimizer_bytes")[batch.layer]
    waits = np.isin(batch.cell, partial.cell)
    parked = bytes_of("grad_bytes")[batch.layer] * waits
    place: dict[str, ArrayLike] = {
        "first": batch.layer,
        "stop": batch.layer + 1,
        "microbatch": -1,
        "step": batch.step,
    }
    start = visits.first_row[batch.visit]
    opens = np.where(gate >= 0, order.rank[batch.last_grad], order.rank[start])
    latest = np.full(updated_cells(table), -1, dtype=np.int64)
    np.maximum.at(latest, partial.cell, order.rank[partial.last_grad])
    ups = builder.transfers(
        "upload",
        "h2d",
        batch.device,
        **place,
        nbytes=state + parked,
        key=np.maximum(opens, latest[batch.cell]),
    )
    previous = np.where(_same_device_before(table, start), start - 1, -1)
    builder.depend(np.where(gate >= 0, gate, previous), ups)
    task_of = np.full(updated_cells(table), -1, dtype=np.int64)
    task_of[batch.cell] = ups
    builder.depend(downloads, task_of[partial.cell])
    updates = builder.tasks(
        len(batch.cell),
        kind=KIND_CODE["update"],
        lane=builder.lane(batch.device, "compute"),
        **place,
        duration_ns=update_ns(table, batch.layer, device_rate(table, batch.device)),
        source=batch.device,
        target=batch.device,
        key=order.rank[batch.last_grad],
    )
    builder.depend(ups, updates)
    downs = builder.transfers(
        "download",
        "d2h",
        batch.device,
        **place,
        nbytes=state + bytes_of("param_bytes")[batch.layer],
        key=order.rank[batch.last_grad],
    )
    builder.depend(updates, downs)
    builder.buffers("optimizer state", batch.layer, batch.device, state + parked, ups, downs)
    hold_room(builder, table, batch.layer, batch.device, updates)
    hold_gradients(builder, table, batch, updates)
    _park(builder, table, order, partial, downloads, task_of)
    return updates, downs


def updated_cells(table: OpTable) -> int:
    """Number of (step, layer) cells."""
    return table.steps * table.work.layers


def _same_device_before(table: OpTable, rows: Ints) -> NDArray[np.bool_]:
    return rows > table.device_start[table.device[rows]]


def _park(
    builder: ProgramBuilder,
    table: OpTable,
    order: Order,
    partial: Made,
    downloads: Ints,
    until: Ints,
) -> None:
    """Host memory for partial gradients, from the first one's arrival until they go up again."""
    mine = np.flatnonzero(until[partial.cell] >= 0)
    cells, which = np.unique(partial.cell[mine], return_inverse=True)
    earliest = mine[earliest_of(order.rank[partial.last_grad[mine]], which, len(cells))]
    layer, host = cells % table.work.layers, builder.work.devices
    nbytes = table.work.layer_bytes("grad_bytes")[layer]
    builder.buffers("gradients", layer, host, nbytes, downloads[earliest], until[cells])
