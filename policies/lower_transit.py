"""Lowering: updates on a device that a layer's states pass through."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..traces.errors import InputError
from ..traces.timeline import KIND_CODE, Ints
from .builder import ProgramBuilder
from .chunks import chunked, chunks_of
from .made_gradients import (
    Made,
    device_rate,
    download_gradients,
    earliest_of,
    hold_gradients,
    hold_room,
    in_order_of_steps,
    is_tied,
    update_ns,
)
from .order import Order
from .program import STATES
from .table import OpTable
from .updated import Updated
from .visits import Visits

IN_TRANSIT = 2
"""States of so many layers are on a device at a time: one is updated while another moves."""

SMALL = 32
"""One more where the oldest of them takes no more than this part of the device's memory.

A step's last update is often of an embedding, whose state takes longest to come up.
"""


def update_in_transit(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    made: Made,
    updated: Updated,
) -> None:
    """The last visit that makes a layer's gradient updates it, with its state passing through.

    Of visits that make it at the same time on several devices one does, in turns; the others'
    gradients come straight from there. Those of earlier visits wait on the host and come along.
    """
    if is_tied(table).any():
        raise InputError(
            "layers that share parameters need optimizer_on host where weights are streamed"
        )
    final, together = _who_updates(table, visits, order, made)
    cells, which = np.unique(made.cell, return_inverse=True)
    latest = np.full(len(cells), -1, dtype=np.int64)
    both = final | together
    np.maximum.at(latest, which[both], order.rank[visits.last_row[made.visit[both]]])
    key = in_order_of_steps(table, cells, latest)
    chosen = np.flatnonzero(final)
    chosen = chosen[np.lexsort((chosen, key[which[chosen]], made.device[chosen]))]
    ends, ends_key = made.rows(chosen), key[which[chosen]]
    updated.visit.reshape(-1)[ends.cell] = ends.visit
    partial = made.rows(np.flatnonzero(~both))
    downloads = download_gradients(builder, table, order, partial)
    sent = made.rows(np.flatnonzero(together))
    end_of = np.full(updated_cells(table), -1, dtype=np.int64)
    end_of[ends.cell] = np.arange(len(chosen))
    target = ends.rows(end_of[sent.cell])
    sends = _send_gradients(builder, table, visits, sent, target, key[which[together]])
    ups, updates, downs, returns = _pass_all_through(
        builder, table, visits, ends, ends_key, partial, updated
    )
    # A step's first come when their visit has let go of what it saved, all when one is down.
    down = _down_before(table, ends)
    later = np.flatnonzero(down >= 0)
    builder.depend(returns[down[later]], ups[later])
    first = np.ones(len(chosen), dtype=np.bool_)
    first[later[ends.step[later] == ends.step[down[later]]]] = False
    builder.depend(visits.last_row[ends.visit[first]], ups[first])
    by_layer = np.lexsort((ends.step, ends.layer))
    same = np.diff(ends.layer[by_layer]) == 0
    builder.depend(returns[by_layer[:-1][same]], ups[by_layer[1:][same]])
    updated.task.reshape(-1)[ends.cell] = downs
    arrives, summed = ups[end_of[partial.cell]], updates[end_of[sent.cell]]
    builder.depend(downloads, arrives)
    builder.depend(sends, summed)
    nbytes = table.work.layer_bytes("grad_bytes")[sent.layer]
    builder.buffers("gradients", sent.layer, target.device, nbytes, sends, summed)
    _park(builder, table, order, partial, downloads, arrives)


def _down_before(table: OpTable, ends: Made) -> Ints:
    """The row whose state is down before a row's comes up, on the same device; or -1.

    The rows are in order of devices and keys.
    """
    limits = np.array([each.memory_bytes for each in table.work.machine.devices])[ends.device]
    nbytes = table.work.layer_bytes("optimizer_bytes")[ends.layer]
    small = (limits == 0) | (SMALL * nbytes <= limits)
    down = np.arange(len(nbytes)) - IN_TRANSIT
    down -= small[np.maximum(down, 0)]
    there = (down >= 0) & (ends.device[np.maximum(down, 0)] == ends.device)
    return np.where(there, down, -1)


def _pass_all_through(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    ends: Made,
    key: Ints,
    partial: Made,
    updated: Updated,
) -> tuple[Ints, Ints, Ints, Ints]:
    """State up, update, weights down, state down of every row. Returns the tasks of each.

    The next step waits for the weights of a device's last update in a synchronous step. So they go
    before the state of the update before it, which may come down beside that step, and in parts, of
    which each may go up again while others are still on their way.
    """
    ups, updates, downs, returns = np.full((4, len(key)), -1, dtype=np.int64)
    last, before = _ends_of_steps(table, ends)
    parts = np.ones(len(key), dtype=np.int64)
    parts[last] = np.maximum(1, chunks_of(table.work.layer_bytes("param_bytes")[ends.layer[last]]))
    updated.parts.reshape(-1)[ends.cell] = parts
    held = table.work.layer_bytes("optimizer_bytes")[ends.layer]
    held += table.work.layer_bytes("grad_bytes")[ends.layer] * np.isin(ends.cell, partial.cell)
    place = _places_among_equals(ends.step, key)
    for number in range(int(place.max(initial=-1)) + 1):
        rows = np.flatnonzero(place == number)
        ups[rows], updates[rows], downs[rows] = _update(
            builder, table, visits, ends.rows(rows), key[rows], held[rows], parts[rows]
        )
        rows = np.setdiff1d(rows, [*last, *before])
        returns[rows] = _return(builder, table, ends.rows(rows), key[rows], downs[rows])
    rows, end_key = np.union1d(last, before), key.copy()
    end_key[before] = key[before + 1]
    returns[rows] = _return(builder, table, ends.rows(rows), end_key[rows], downs[rows])
    builder.buffers("optimizer state", ends.layer, ends.device, held, ups, returns)
    return ups, updates, downs, returns


def _ends_of_steps(table: OpTable, ends: Made) -> tuple[Ints, Ints]:
    """The row of each device's last update in each synchronous step, and those right before one.

    The rows are in order of devices and keys. Beside a stale step there is always another one.
    """
    if table.rules.optimizer != "sync":
        none = np.empty(0, dtype=np.int64)
        return none, none
    last = np.flatnonzero(np.diff(ends.device * table.steps + ends.step, append=-1))
    before = np.setdiff1d(last - 1, last)  # Not where a device's last is its only one.
    return last, before[before >= 0]


def _who_updates(
    table: OpTable, visits: Visits, order: Order, made: Made
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows update their cell's layer, and which make its gradient at the same time."""
    cells, which = np.unique(made.cell, return_inverse=True)
    rank = order.rank[made.last_grad]
    last = earliest_of(-rank, which, len(cells))
    # The last on its device, not done when the last of all begins.
    _, own = np.unique(made.cell * table.work.devices + made.device, return_inverse=True)
    last_here = np.zeros(len(rank), dtype=np.bool_)
    last_here[earliest_of(-rank, own, int(own.max(initial=-1)) + 1)] = True
    begins = order.rank[visits.first_row[made.visit[last]]]
    able = np.flatnonzero(last_here & (rank >= begins[which]))
    able = able[np.lexsort((made.device[able], which[able]))]
    starts = np.searchsorted(which[able], np.arange(len(cells)))
    counts = np.diff(np.append(starts, len(able)))
    chosen = able[starts + made.layer[last] % counts]
    final = np.zeros(len(rank), dtype=np.bool_)
    final[chosen] = True
    together = np.zeros(len(rank), dtype=np.bool_)
    together[able] = True
    return final, together & ~final


def _send_gradients(
    builder: ProgramBuilder, table: OpTable, visits: Visits, sent: Made, target: Made, key: Ints
) -> Ints:
    """Each row's gradients to the row's target, which updates; its visit has made room for them.

    Returns a task a row, -1 for no bytes.
    """
    nbytes = table.work.layer_bytes("grad_bytes")[sent.layer]
    some = np.flatnonzero(nbytes > 0)
    chosen = sent.rows(some)
    sends = np.full(len(nbytes), -1, dtype=np.int64)
    sends[some] = builder.sends(
        chosen.device,
        target.device[some],
        first=chosen.layer,
        stop=chosen.layer + 1,
        microbatch=-1,
        step=chosen.step,
        nbytes=nbytes[some],
        key=key[some],
    )
    builder.depend(sent.last_grad, sends)
    builder.depend(visits.last_row[target.visit], sends)
    hold_gradients(builder, table, sent, sends)
    return sends


def _places_among_equals(step: Ints, key: Ints) -> Ints:
    """Each row's number among those of the same key, earlier steps' first.

    Tasks are made in this order, so that one which waits for another of its key has a higher
    number.
    """
    by_key = np.lexsort((step, key))
    starts = np.flatnonzero(np.diff(key[by_key], prepend=-2))
    sizes = np.diff(np.append(starts, len(key)))
    places = np.empty(len(key), dtype=np.int64)
    places[by_key] = np.arange(len(key)) - np.repeat(starts, sizes)
    return places


def _place(batch: Made, key: Ints) -> dict[str, ArrayLike]:
    return {
        "first": batch.layer,
        "stop": batch.layer + 1,
        "microbatch": -1,
        "step": batch.step,
        "key": key,
    }


def _update(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    batch: Made,
    key: Ints,
    held: NDArray[np.int64],
    parts: Ints,
) -> tuple[Ints, Ints, Ints]:
    """State up, update, weights down, one layer a row. Returns the tasks of each.

    held: bytes of a row's state, and of what waited on the host to come up with it. The next step
    waits for the weights alone. They go in so many `parts`; the last one is returned.
    """
    place = _place(batch, key)
    # On a lane of their own: nothing that the ops wait for is to queue up behind them.
    ups = builder.transfers(
        "upload",
        "optimizer",
        batch.device,
        **place,
        nbytes=held,
    )
    updates = builder.tasks(
        len(batch.cell),
        kind=KIND_CODE["update"],
        lane=_lane_of_updates(builder, table, batch),
        **place,
        duration_ns=update_ns(table, batch.layer, device_rate(table, batch.device)),
        source=batch.device,
        target=batch.device,
    )
    builder.depend(ups, updates)
    builder.depend(visits.last_row[batch.visit], updates)
    row, part, nbytes = chunked(table.work.layer_bytes("param_bytes")[batch.layer], parts)
    split = batch.rows(row)
    downs = builder.transfers(
        "download", "d2h", split.device, **_place(split, key[row]), part=part, nbytes=nbytes
    )
    builder.depend(updates[row], downs)
    downs = downs[part == parts[row] - 1]
    hold_room(builder, table, batch.layer, batch.device, updates)
    hold_gradients(builder, table, batch, updates)
    return ups, updates, downs


def _return(builder: ProgramBuilder, table: OpTable, batch: Made, key: Ints, downs: Ints) -> Ints:
    """State down, one layer a row."""
    returns = builder.transfers(
        "download",
        "d2h",
        batch.device,
        **_place(batch, key),
        part=STATES,
        nbytes=table.work.layer_bytes("optimizer_bytes")[batch.layer],
    )
    builder.depend(downs, returns)
    return returns


def _lane_of_updates(builder: ProgramBuilder, table: OpTable, batch: Made) -> Ints:
    """Beside the ops; where it needs more room than its state has, among them: it may be theirs."""
    room, state = (
        table.work.layer_bytes(field)[batch.layer]
        for field in ("update_workspace_bytes", "optimizer_bytes")
    )
    beside, among = (builder.lane(batch.device, kind) for kind in ("d2h", "compute"))
    return np.where(room > state, among, beside)


def updated_cells(table: OpTable) -> int:
    """Number of (step, layer) cells."""
    return table.steps * table.work.layers


def _park(
    builder: ProgramBuilder,
    table: OpTable,
    order: Order,
    partial: Made,
    downloads: Ints,
    until: Ints,
) -> None:
    """Host memory for partial gradients, from the first one's arrival until they go up again."""
    cells, which = np.unique(partial.cell, return_inverse=True)
    earliest = earliest_of(order.rank[partial.last_grad], which, len(cells))
    layer, host = cells % table.work.layers, builder.work.devices
    nbytes = table.work.layer_bytes("grad_bytes")[layer]
    builder.buffers("gradients", layer, host, nbytes, downloads[earliest], until[earliest])
