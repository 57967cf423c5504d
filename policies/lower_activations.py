"""Lowering, what passes between layers: activations, gradients, and where they wait."""

import numpy as np

from ..traces.timeline import Ints
from .builder import ProgramBuilder
from .flows import BACKWARD_SIDE, gradient_needs, loss_needs
from .order import Order
from .table import OpTable, R, W
from .visits import Visits

FETCH_AHEAD = 4
"""An activation that waits on the host is fetched while the device is this many ops before.

And no sooner than its visit's weights may come.
"""


class Copies:
    """Tensors grouped by where they are read: one row a (boundary, group, device, stashed).

    `first_use` and `last_use` are rows of the table. `stashed` copies are read by a recompute
    long after they were made, and wait on the host.
    """

    def __init__(self, table: OpTable, rows: Ints, boundary: Ints, stashed: Ints) -> None:
        cell = boundary.astype(np.int64) * table.groups + table.group[rows]
        key = (cell * 2 + stashed) * table.work.devices + table.device[rows]
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        ends = np.append(starts[1:], len(order)) - 1
        found = key[order][starts] if len(order) else key
        self.first_use, self.last_use = rows[order][starts], rows[order][ends[: len(starts)]]
        self.device = found % table.work.devices
        self.stashed = (found // table.work.devices) % 2 == 1
        self.cell = found // table.work.devices // 2
        self.boundary = self.cell // table.groups

    def nbytes(self, table: OpTable) -> Ints:
        """Bytes of each copy."""
        return np.asarray(table.work.layer_bytes("output_bytes")[self.boundary])


def lower_activations(
    builder: ProgramBuilder, table: OpTable, visits: Visits, order: Order
) -> None:
    """Outputs of forward: kept where they are made, sent on, or put on the host until recompute."""
    rows = np.flatnonzero(table.first > 0)
    copies = Copies(table, rows, table.first[rows] - 1, _is_stashed(table, rows))
    makers = table.forward_of.reshape(-1)[copies.cell]
    outputs = _outputs(builder, table, "boundary activations", makers, copies)
    direct = np.flatnonzero(~copies.stashed)
    _hand_on(builder, table, order, "boundary activations", makers, copies, outputs, direct)
    _stash(builder, table, visits, order, makers, copies, outputs)


def lower_gradient_flows(builder: ProgramBuilder, table: OpTable, order: Order) -> None:
    """Gradients for a layer's output: used where they are made, or sent back."""
    _, rows = gradient_needs(table)
    rows = np.sort(np.concatenate((rows, _weight_rows(table))))
    copies = Copies(table, rows, table.stop[rows] - 1, np.zeros(len(rows), dtype=np.int64))
    makers = table.backward_of.reshape(-1)[copies.cell + table.groups]
    outputs = _outputs(builder, table, "boundary gradients", makers, copies)
    before, after = loss_needs(table)
    elsewhere = table.device[before] != table.device[after]
    builder.depend(before[elsewhere], after[elsewhere])
    every = np.arange(len(makers))
    _hand_on(builder, table, order, "boundary gradients", makers, copies, outputs, every)


def _weight_rows(table: OpTable) -> Ints:
    """`W` ops read the gradient again, after the `I` that received it."""
    return np.flatnonzero(table.is_kind(W) & (table.stop < table.work.layers))


def _is_stashed(table: OpTable, rows: Ints) -> Ints:
    """Whether a row reads its input for a recompute, where that waits on the host."""
    if table.rules.activations == "device":
        return np.zeros(len(rows), dtype=np.int64)
    again = table.recompute_of[table.first[rows], table.group[rows]] >= 0
    backward = table.is_kind(*BACKWARD_SIDE)[rows] & again
    return (table.is_kind(R)[rows] | backward).astype(np.int64)


def _outputs(
    builder: ProgramBuilder, table: OpTable, label: str, makers: Ints, copies: Copies
) -> Ints:
    """One buffer per tensor on the device that makes it; returns each copy's buffer."""
    _, first, which = np.unique(copies.cell, return_index=True, return_inverse=True)
    made_by = makers[first]
    nbytes = copies.nbytes(table)[first]
    layer = copies.boundary[first]
    return builder.buffers(label, layer, table.device[made_by], nbytes, made_by, made_by)[which]


def _hand_on(
    builder: ProgramBuilder,
    table: OpTable,
    order: Order,
    label: str,
    makers: Ints,
    copies: Copies,
    outputs: Ints,
    chosen: Ints,
) -> None:
    local = chosen[table.device[makers[chosen]] == copies.device[chosen]]
    builder.use(outputs[local], copies.last_use[local])
    far = chosen[table.device[makers[chosen]] != copies.device[chosen]]
    # Of an op's several sends those that a recompute reads, much later, go last.
    far = far[np.argsort(table.is_kind(R)[copies.first_use[far]], kind="stable")]
    maker, device = makers[far], copies.device[far]
    nbytes = copies.nbytes(table)[far]
    sends = builder.sends(
        table.device[maker], device, **_about(table, copies, far), key=order.rank[maker]
    )
    builder.depend(maker, sends)
    builder.depend(sends, copies.first_use[far])
    builder.use(outputs[far], sends)
    builder.buffers(label, copies.boundary[far], device, nbytes, sends, copies.last_use[far])


def _about(table: OpTable, copies: Copies, chosen: Ints) -> dict[str, Ints]:
    group = copies.cell[chosen] % table.groups
    return {
        "first": copies.boundary[chosen],
        "stop": copies.boundary[chosen] + 1,
        "microbatch": group % table.work.microbatches,
        "step": group // table.work.microbatches,
        "nbytes": copies.nbytes(table)[chosen],
    }


def _stash(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    makers: Ints,
    copies: Copies,
    outputs: Ints,
) -> None:
    fetched = np.flatnonzero(copies.stashed)
    _, first, which = np.unique(copies.cell[fetched], return_index=True, return_inverse=True)
    down = fetched[first]
    maker = makers[down]
    offloads = builder.transfers(
        "offload",
        "d2h",
        table.device[maker],
        **_about(table, copies, down),
        key=order.rank[maker],
    )
    builder.depend(maker, offloads)
    builder.use(outputs[down], offloads)
    host = builder.work.devices
    parked = builder.buffers(
        "boundary activations",
        copies.boundary[down],
        host,
        copies.nbytes(table)[down],
        offloads,
        offloads,
    )
    _fetch(builder, table, visits, order, makers, copies, fetched, offloads[which], parked[which])


def _fetch(
    builder: ProgramBuilder,
    table: OpTable,
    visits: Visits,
    order: Order,
    makers: Ints,
    copies: Copies,
    fetched: Ints,
    offloads: Ints,
    parked: Ints,
) -> None:
    use, device = copies.first_use[fetched], copies.device[fetched]
    gate = use - FETCH_AHEAD - 1
    gate = np.where(gate >= table.device_start[device], gate, -1)
    if table.rules.weights == "streamed":
        gate = np.maximum(gate, visits.makes_room(visits.of_rows(use)))
    opens = np.where(gate >= 0, order.rank[gate], -1)
    fetches = builder.transfers(
        "fetch",
        "h2d",
        device,
        **_about(table, copies, fetched),
        key=np.maximum(opens, order.rank[makers[fetched]]),
    )
    builder.depend(offloads, fetches)
    builder.depend(gate, fetches)
    builder.depend(fetches, use)
    builder.use(parked, fetches)
    nbytes = copies.nbytes(table)[fetched]
    builder.buffers(
        "boundary activations",
        copies.boundary[fetched],
        device,
        nbytes,
        fetches,
        copies.last_use[fetched],
    )
