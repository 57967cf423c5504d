"""Lowering, the optimizer: gradients down, updates layer by layer, states in transit."""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..traces.errors import InputError
from ..traces.timeline import KIND_CODE, Ints
from .builder import ProgramBuilder
from .order import Order
from .table import OpTable
from .visits import Visits


@dataclass(frozen=True)
class Updated:
    """Shape (steps, layers): the task after which a layer's new weights can be used, or -1.

    `visit` is the visit whose copy of the weights is updated on the device, or -1.
    """

    task: Ints
    visit: Ints


@dataclass(frozen=True)
class _Made:
    """One row a (visit, layer) that makes weight gradients, each visit's last layer first."""

    visit: Ints
    layer: Ints
    device: Ints
    step: Ints
    first_grad: Ints
    last_grad: Ints
    cell: Ints

    def rows(self, chosen: Ints) -> "_Made":
        return _Made(*(column[chosen] for column in vars(self).values()))


def lower_optimizer(
    builder: ProgramBuilder, table: OpTable, visits: Visits, order: Order
) -> Updated:
    """Add gradients, their downloads, updates and what they hold. Returns when weights are new."""
    plan, layers = table.rules, table.work.layers
    shape = (table.steps, layers)
    updated = Updated(np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64))
    made = _made(table, visits)
    _states(builder, table)
    if plan.optimizer_on == "host":
        _update_on_host(builder, table, order, made, updated)
    elif plan.weights == "resident":
        _update_on_home(builder, table, visits, order, made, updated)
    else:
        _update_in_transit(builder, table, visits, order, made, updated)
    return updated


def home_of(table: OpTable) -> Ints:
    """The device of each layer where weights are resident."""
    return table.device[table.forward_of[:, 0]]


def _made(table: OpTable, visits: Visits) -> _Made:
    visit, layer = visits.layers(np.flatnonzero(visits.last_grad >= 0))
    trained = _updated(table) | (table.work.layer_bytes("grad_bytes") > 0)
    visit, layer = visit[trained[layer]], layer[trained[layer]]
    step = visits.step[visit]
    ends = (visits.first_grad[visit], visits.last_grad[visit])
    return _Made(visit, layer, visits.device[visit], step, *ends, step * table.work.layers + layer)


def _updated(table: OpTable) -> NDArray[np.bool_]:
    """Which layers have parameters of their own to update.

    Where none has, the trace knows times only: then all are updated, at no cost.
    """
    trained = np.array([each.params_to_update > 0 for each in table.work.trace.layers])
    return trained if trained.any() else ~trained


def _is_tied(table: OpTable) -> NDArray[np.bool_]:
    """Which layers share parameters that an earlier layer owns."""
    return np.asarray(table.work.owner != np.arange(table.work.layers))


def _due(table: OpTable, made: _Made) -> tuple[Ints, Ints]:
    """(row of `made`, cell of the update that it is for): its own layer's, and its owner's."""
    own = np.flatnonzero(_updated(table)[made.layer])
    tied = np.flatnonzero(_is_tied(table)[made.layer])
    owners = made.step[tied] * table.work.layers + table.work.owner[made.layer[tied]]
    return np.concatenate((own, tied)), np.concatenate((made.cell[own], owners))


def _share_update(table: OpTable, updated: Updated) -> None:
    """A layer that shares parameters is new when their owner's update is, which is the later."""
    tied = np.flatnonzero(_is_tied(table))
    updated.task[:, tied] = updated.task[:, table.work.owner[tied]]


def _states(builder: ProgramBuilder, table: OpTable) -> None:
    plan = table.rules
    on_device = plan.optimizer_on == "device" and plan.weights == "resident"
    pool = home_of(table) if on_device else builder.work.devices
    nbytes = table.work.layer_bytes("optimizer_bytes")
    builder.buffers("optimizer state", np.arange(len(nbytes)), pool, nbytes, -1)


def _update_ns(table: OpTable, layer: Ints, rate: Ints) -> NDArray[np.int64]:
    params = np.array([each.params_to_update for each in table.work.trace.layers], dtype=object)
    return np.array(
        [
            ceil(n * 10**9 / r) if r else 0
            for n, r in zip(params[layer], rate.tolist(), strict=True)
        ],
        dtype=np.int64,
    )


def _device_rate(table: OpTable, device: Ints) -> Ints:
    rates = [each.optimizer_params_per_s for each in table.work.machine.devices]
    return np.array(rates, dtype=np.int64)[device]


def _host_rate(table: OpTable, count: int) -> Ints:
    return np.full(count, table.work.machine.host.optimizer_params_per_s, dtype=np.int64)


def _sum_ns(table: OpTable, layer: Ints, downloads: Ints) -> NDArray[np.int64]:
    """Time to add up what came down for each layer in several parts, charged with its update."""
    rate = np.full(len(layer), table.work.machine.host.sum_params_per_s, dtype=np.int64)
    return np.maximum(downloads - 1, 0) * _update_ns(table, layer, rate)


def _gradients(builder: ProgramBuilder, table: OpTable, made: _Made, until: Ints) -> None:
    nbytes = table.work.layer_bytes("grad_bytes")[made.layer]
    builder.buffers("gradients", made.layer, made.device, nbytes, made.first_grad, until)


def _downloads(builder: ProgramBuilder, table: OpTable, order: Order, made: _Made) -> Ints:
    """A download a row, or -1 where there is nothing to bring down."""
    nbytes = table.work.layer_bytes("grad_bytes")[made.layer]
    some = np.flatnonzero(nbytes > 0)
    chosen = made.rows(some)
    downloads = np.full(len(nbytes), -1, dtype=np.int64)
    downloads[some] = builder.transfers(
        "download",
        "d2h",
        chosen.device,
        first=chosen.layer,
        stop=chosen.layer + 1,
        microbatch=-1,
        step=chosen.step,
        nbytes=nbytes[some],
        key=order.rank[chosen.last_grad],
    )
    builder.depend(made.last_grad, downloads)
    _gradients(builder, table, made, downloads)
    return downloads


def _norms(builder: ProgramBuilder, order: Order, made: _Made, finals: Ints) -> Ints:
    """One task a step that waits for every gradient, so that all can be clipped together."""
    steps = len(order.norm_rank)
    norms = builder.tasks(
        steps,
        kind=KIND_CODE["norm"],
        lane=builder.host_lane,
        microbatch=-1,
        step=np.arange(steps),
        source=-1,
        target=-1,
        key=order.norm_rank,
    )
    builder.depend(finals, norms[made.step])
    return norms


def _update_on_host(
    builder: ProgramBuilder, table: OpTable, order: Order, made: _Made, updated: Updated
) -> None:
    downloads = _downloads(builder, table, order, made)
    finals = np.where(downloads >= 0, downloads, made.last_grad)
    norms = _norms(builder, order, made, finals) if table.rules.clip else None
    rows, due = _due(table, made)
    cells, which = np.unique(due, return_inverse=True)
    # Of updates that become possible together the last layer's comes first, as gradients do.
    cells, which = cells[::-1], len(cells) - 1 - which
    step, layer = np.divmod(cells, table.work.layers)
    key = np.full(len(cells), -1, dtype=np.int64)
    np.maximum.at(key, which, order.rank[made.last_grad[rows]])
    if norms is not None:
        key = np.maximum(key, order.norm_rank[step])
    updates = builder.tasks(
        len(cells),
        kind=KIND_CODE["update"],
        lane=builder.host_lane,
        first=layer,
        stop=layer + 1,
        microbatch=-1,
        step=step,
        duration_ns=_update_ns(table, layer, _host_rate(table, len(layer)))
        + _sum_ns(table, layer, np.bincount(which[downloads[rows] >= 0], minlength=len(cells))),
        source=-1,
        target=-1,
        key=key,
    )
    builder.depend(finals[rows], updates[which])
    if norms is not None:
        builder.depend(norms[step], updates)
    earliest = rows[_earliest(order.rank[made.last_grad[rows]], which, len(cells))]
    nbytes, host = table.work.layer_bytes("grad_bytes")[layer], builder.work.devices
    builder.buffers("gradients", layer, host, nbytes, downloads[earliest], updates)
    updated.task.reshape(-1)[cells] = updates
    _share_update(table, updated)
    if table.rules.weights == "resident":
        _return_weights(builder, table, order, updated)


def _earliest(rank: Ints, which: Ints, count: int) -> Ints:
    """For each of `count` groups, the index of its member of lowest rank."""
    by_group = np.lexsort((rank, which))
    return by_group[np.searchsorted(which[by_group], np.arange(count))]


def _return_weights(
    builder: ProgramBuilder, table: OpTable, order: Order, updated: Updated
) -> None:
    """Weights that were updated on the host go up again to the layers' homes."""
    cells = np.flatnonzero(updated.task.reshape(-1) >= 0)
    step, layer = np.divmod(cells, table.work.layers)
    nbytes = table.work.layer_bytes("param_bytes")
    uploads = builder.transfers(
        "upload",
        "h2d",
        home_of(table)[layer],
        first=layer,
        stop=layer + 1,
        microbatch=-1,
        step=step,
        nbytes=nbytes[layer],
        key=order.update_rank[step, table.work.owner[layer]],
    )
    builder.depend(updated.task.reshape(-1)[cells], uploads)
    trained = np.unique(layer)
    builder.buffers("weights", trained, builder.work.devices, nbytes[trained], -1)
    updated.task.reshape(-1)[cells] = uploads


def _update_on_home(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    made: _Made,
    updated: Updated,
) -> None:
    rows, due = _due(table, made)
    cells, which = np.unique(due, return_inverse=True)
    step, layer = np.divmod(cells, table.work.layers)
    device = home_of(table)[layer]
    sends = _send_shared(builder, table, order, made)
    norms = _norms(builder, order, made, made.last_grad) if table.rules.clip else None
    key = order.rank[_last_row(table, visits)[device, step]].copy()
    np.maximum.at(key, which, order.rank[made.last_grad[rows]])
    if norms is not None:
        key = np.maximum(key, order.norm_rank[step])
    updates = builder.tasks(
        len(cells),
        kind=KIND_CODE["update"],
        lane=builder.lane(device, "compute"),
        first=layer,
        stop=layer + 1,
        microbatch=-1,
        step=step,
        duration_ns=_update_ns(table, layer, _device_rate(table, device)),
        source=device,
        target=device,
        key=key,
    )
    if norms is not None:
        builder.depend(sends, norms[made.step])
        builder.depend(norms[step], updates)
    _room(builder, table, layer, device, updates)
    updated.task.reshape(-1)[cells] = updates
    until = made.last_grad.copy()
    until[rows] = updates[which]
    _gradients(builder, table, made, until)
    keys = np.zeros(updated.task.size, dtype=np.int64)
    keys[cells] = key
    _share_update(table, updated)
    _return_shared(builder, table, made, sends, updated, keys)


def _send_shared(builder: ProgramBuilder, table: OpTable, order: Order, made: _Made) -> Ints:
    """Gradients of shared parameters go to their owner's device. Returns a task a row, or -1."""
    home, owner = home_of(table), table.work.owner
    far = np.flatnonzero(home[made.layer] != home[owner[made.layer]])
    sends = np.full(len(made.cell), -1, dtype=np.int64)
    sends[far] = _shared_sends(
        builder, table, made.rows(far), made.device[far], order.rank[made.last_grad[far]]
    )
    builder.depend(made.last_grad, sends)
    return sends


def _return_shared(
    builder: ProgramBuilder,
    table: OpTable,
    made: _Made,
    sends: Ints,
    updated: Updated,
    keys: Ints,
) -> None:
    """Shared parameters' new values go back to the other devices that have them."""
    rows = np.flatnonzero(sends >= 0)
    owners = made.step[rows] * table.work.layers + table.work.owner[made.layer[rows]]
    updates = updated.task.reshape(-1)[owners]
    builder.depend(sends[rows], updates)
    device = home_of(table)[table.work.owner[made.layer[rows]]]
    back = _shared_sends(builder, table, made.rows(rows), device, keys[owners])
    builder.depend(updates, back)
    updated.task[made.step[rows], made.layer[rows]] = back


def _shared_sends(
    builder: ProgramBuilder, table: OpTable, made: _Made, source: Ints, key: Ints
) -> Ints:
    """Sends between the device of each row's layer and the device of its owner."""
    home, owner = home_of(table), table.work.owner[made.layer]
    return builder.tasks(
        len(made.cell),
        kind=KIND_CODE["send"],
        lane=builder.lane(source, "peer"),
        first=made.layer,
        stop=made.layer + 1,
        microbatch=-1,
        step=made.step,
        nbytes=table.work.layer_bytes("grad_bytes")[owner],
        source=source,
        target=home[made.layer] + home[owner] - source,
        key=key,
    )


def _last_row(table: OpTable, visits: Visits) -> Ints:
    """Shape (devices, steps): the last row of each device in each step."""
    last = np.full((table.work.devices, table.steps), -1, dtype=np.int64)
    np.maximum.at(last, (visits.device, visits.step), visits.last_row)
    return last


def _update_in_transit(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    made: _Made,
    updated: Updated,
) -> None:
    """The last visit that makes a layer's gradient updates it, with its state passing through.

    Earlier visits' gradients wait on the host and come along. Two layers' states are on a device
    at a time.
    """
    if _is_tied(table).any():
        raise InputError(
            "layers that share parameters need optimizer_on host where weights are streamed"
        )
    cells, which = np.unique(made.cell, return_inverse=True)
    last = _earliest(-order.rank[made.last_grad], which, len(cells))
    final = np.zeros(len(made.cell), dtype=np.bool_)
    final[last] = True
    updated.visit.reshape(-1)[cells] = made.visit[last]
    partial = made.rows(np.flatnonzero(~final))
    downloads = _downloads(builder, table, order, partial)
    ends = made.rows(np.flatnonzero(final))
    turn = _turns(ends.visit)
    before = np.full((2, len(visits.step)), -1, dtype=np.int64)
    for number in range(int(turn.max(initial=-1)) + 1):
        batch = ends.rows(np.flatnonzero(turn == number))
        gate = before[number % 2][batch.visit]
        updates = _pass_through(builder, table, visits, order, batch, gate, partial, downloads)
        before[number % 2][batch.visit] = updates[0]
        updated.task.reshape(-1)[batch.cell] = updates[1]


def _room(
    builder: ProgramBuilder, table: OpTable, layer: Ints, device: Ints, updates: Ints
) -> None:
    """What updates need on a device while they run."""
    nbytes = table.work.layer_bytes("update_workspace_bytes")[layer]
    builder.buffers("workspace", layer, device, nbytes, updates, updates)


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
    batch: _Made,
    gate: Ints,
    partial: _Made,
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
        duration_ns=_update_ns(table, batch.layer, _device_rate(table, batch.device)),
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
    _room(builder, table, batch.layer, batch.device, updates)
    _gradients(builder, table, batch, updates)
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
    partial: _Made,
    downloads: Ints,
    until: Ints,
) -> None:
    """Host memory for partial gradients, from the first one's arrival until they go up again."""
    mine = np.flatnonzero(until[partial.cell] >= 0)
    cells, which = np.unique(partial.cell[mine], return_inverse=True)
    earliest = mine[_earliest(order.rank[partial.last_grad[mine]], which, len(cells))]
    layer, host = cells % table.work.layers, builder.work.devices
    nbytes = table.work.layer_bytes("grad_bytes")[layer]
    builder.buffers("gradients", layer, host, nbytes, downloads[earliest], until[cells])
