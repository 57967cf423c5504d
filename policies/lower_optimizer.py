"""Lowering, the optimizer: gradients down, updates layer by layer, states in transit."""

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import KIND_CODE, Ints
from .builder import ProgramBuilder
from .lower_transit import update_in_transit
from .made_gradients import (
    Made,
    device_rate,
    download_gradients,
    due_updates,
    earliest_of,
    hold_gradients,
    hold_room,
    in_order_of_steps,
    is_tied,
    made_gradients,
    update_ns,
)
from .order import Order
from .table import OpTable
from .updated import Updated
from .visits import Visits


def lower_optimizer(
    builder: ProgramBuilder, table: OpTable, visits: Visits, order: Order
) -> Updated:
    """Add gradients, their downloads, updates and what they hold. Returns when weights are new."""
    plan, layers = table.rules, table.work.layers
    updated = Updated.none(table.steps, layers)
    made = made_gradients(table, visits)
    _states(builder, table)
    if plan.optimizer_on == "host":
        _update_on_host(builder, table, order, made, updated)
    elif plan.weights == "resident":
        _update_on_home(builder, table, visits, order, made, updated)
    else:
        update_in_transit(builder, table, visits, order, made, updated)
    return updated


def home_of(table: OpTable) -> Ints:
    """The device of each layer where weights are resident."""
    return table.device[table.forward_of[:, 0]]


def _share_update(table: OpTable, updated: Updated) -> None:
    """A layer that shares parameters is new when their owner's update is, which is the later."""
    tied = np.flatnonzero(is_tied(table))
    updated.task[:, tied] = updated.task[:, table.work.owner[tied]]


def _states(builder: ProgramBuilder, table: OpTable) -> None:
    plan = table.rules
    on_device = plan.optimizer_on == "device" and plan.weights == "resident"
    pool = home_of(table) if on_device else builder.work.devices
    nbytes = table.work.layer_bytes("optimizer_bytes")
    builder.buffers("optimizer state", np.arange(len(nbytes)), pool, nbytes, -1)


def _host_rate(table: OpTable, count: int) -> Ints:
    return np.full(count, table.work.machine.host.optimizer_params_per_s, dtype=np.int64)


def _sum_ns(table: OpTable, layer: Ints, downloads: Ints) -> NDArray[np.int64]:
    """Time to add up what came down for each layer in several parts, charged with its update."""
    rate = np.full(len(layer), table.work.machine.host.sum_params_per_s, dtype=np.int64)
    return np.maximum(downloads - 1, 0) * update_ns(table, layer, rate)


def _norms(builder: ProgramBuilder, order: Order, made: Made, finals: Ints) -> Ints:
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
    builder: ProgramBuilder, table: OpTable, order: Order, made: Made, updated: Updated
) -> None:
    downloads = download_gradients(builder, table, order, made)
    finals = np.where(downloads >= 0, downloads, made.last_grad)
    norms = _norms(builder, order, made, finals) if table.rules.clip else None
    rows, due = due_updates(table, made)
    cells, which = np.unique(due, return_inverse=True)
    # Of updates that become possible together the last layer's comes first, as gradients do.
    step, layer = np.divmod(cells, table.work.layers)
    first = np.lexsort((-layer, step))
    cells, step, layer = cells[first], step[first], layer[first]
    which = np.argsort(first)[which]
    latest = np.full(len(cells), -1, dtype=np.int64)
    np.maximum.at(latest, which, order.rank[made.last_grad[rows]])
    if norms is not None:
        latest = np.maximum(latest, order.norm_rank[step])
    key = in_order_of_steps(table, cells, latest)
    updates = builder.tasks(
        len(cells),
        kind=KIND_CODE["update"],
        lane=builder.host_lane,
        first=layer,
        stop=layer + 1,
        microbatch=-1,
        step=step,
        duration_ns=update_ns(table, layer, _host_rate(table, len(layer)))
        + _sum_ns(table, layer, np.bincount(which[downloads[rows] >= 0], minlength=len(cells))),
        source=-1,
        target=-1,
        key=key,
    )
    builder.depend(finals[rows], updates[which])
    if norms is not None:
        builder.depend(norms[step], updates)
    earliest = rows[earliest_of(order.rank[made.last_grad[rows]], which, len(cells))]
    nbytes, host = table.work.layer_bytes("grad_bytes")[layer], builder.work.devices
    builder.buffers("gradients", layer, host, nbytes, downloads[earliest], updates)
    updated.task.reshape(-1)[cells] = updates
    _share_update(table, updated)
    if table.rules.weights == "resident":
        _return_weights(builder, table, order, updated)


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
    made: Made,
    updated: Updated,
) -> None:
    rows, due = due_updates(table, made)
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
        duration_ns=update_ns(table, layer, device_rate(table, device)),
        source=device,
        target=device,
        key=key,
    )
    if norms is not None:
        builder.depend(sends, norms[made.step])
        builder.depend(norms[step], updates)
    hold_room(builder, table, layer, device, updates)
    updated.task.reshape(-1)[cells] = updates
    until = made.last_grad.copy()
    until[rows] = updates[which]
    hold_gradients(builder, table, made, until)
    keys = np.zeros(updated.task.size, dtype=np.int64)
    keys[cells] = key
    _share_update(table, updated)
    _return_shared(builder, table, made, sends, updated, keys)


def _send_shared(builder: ProgramBuilder, table: OpTable, order: Order, made: Made) -> Ints:
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
    made: Made,
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
    builder: ProgramBuilder, table: OpTable, made: Made, source: Ints, key: Ints
) -> Ints:
    """Sends between the device of each row's layer and the device of its owner."""
    home, owner = home_of(table), table.work.owner[made.layer]
    return builder.sends(
        source,
        home[made.layer] + home[owner] - source,
        first=made.layer,
        stop=made.layer + 1,
        microbatch=-1,
        step=made.step,
        nbytes=table.work.layer_bytes("grad_bytes")[owner],
        key=key,
    )


def _last_row(table: OpTable, visits: Visits) -> Ints:
    """Shape (devices, steps): the last row of each device in each step."""
    last = np.full((table.work.devices, table.steps), -1, dtype=np.int64)
    np.maximum.at(last, (visits.device, visits.step), visits.last_row)
    return last
