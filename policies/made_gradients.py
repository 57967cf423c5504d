"""Lowering: which visits make which layers' gradients, where those go, what updates cost."""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints
from .builder import ProgramBuilder
from .order import Order
from .table import OpTable
from .visits import Visits


@dataclass(frozen=True)
class Made:
    """One row a (visit, layer) that makes weight gradients, each visit's last layer first."""

    visit: Ints
    layer: Ints
    device: Ints
    step: Ints
    first_grad: Ints
    last_grad: Ints
    cell: Ints

    def rows(self, chosen: Ints) -> "Made":
        """Only these rows."""
        return Made(*(column[chosen] for column in vars(self).values()))


def made_gradients(table: OpTable, visits: Visits) -> Made:
    """All of them: of layers that are updated, or whose gradients belong to an earlier layer."""
    visit, layer = visits.layers(np.flatnonzero(visits.last_grad >= 0))
    trained = is_updated(table) | (table.work.layer_bytes("grad_bytes") > 0)
    visit, layer = visit[trained[layer]], layer[trained[layer]]
    step = visits.step[visit]
    ends = (visits.first_grad[visit], visits.last_grad[visit])
    return Made(visit, layer, visits.device[visit], step, *ends, step * table.work.layers + layer)


def is_updated(table: OpTable) -> NDArray[np.bool_]:
    """Which layers have parameters of their own to update.

    Where none has, the trace knows times only: then all are updated, at no cost.
    """
    trained = np.array([each.params_to_update > 0 for each in table.work.trace.layers])
    return trained if trained.any() else ~trained


def is_tied(table: OpTable) -> NDArray[np.bool_]:
    """Which layers share parameters that an earlier layer owns."""
    return np.asarray(table.work.owner != np.arange(table.work.layers))


def due_updates(table: OpTable, made: Made) -> tuple[Ints, Ints]:
    """(row of `made`, cell of the update that it is for): its own layer's, and its owner's."""
    own = np.flatnonzero(is_updated(table)[made.layer])
    tied = np.flatnonzero(is_tied(table)[made.layer])
    owners = made.step[tied] * table.work.layers + table.work.owner[made.layer[tied]]
    return np.concatenate((own, tied)), np.concatenate((made.cell[own], owners))


def earliest_of(rank: Ints, which: Ints, count: int) -> Ints:
    """For each of `count` groups, the index of its member of lowest rank."""
    by_group = np.lexsort((rank, which))
    return by_group[np.searchsorted(which[by_group], np.arange(count))]


def in_order_of_steps(table: OpTable, cells: Ints, key: Ints) -> NDArray[np.int64]:
    """Keys of these (step, layer) cells, each at least that of the layer's step before."""
    every = np.full((table.steps, table.work.layers), -1, dtype=np.int64)
    every.reshape(-1)[cells] = key
    return np.asarray(np.maximum.accumulate(every).reshape(-1)[cells])


def hold_gradients(builder: ProgramBuilder, table: OpTable, made: Made, until: Ints) -> None:
    """Their memory on the devices, from a visit's first backward until these tasks are done."""
    nbytes = table.work.layer_bytes("grad_bytes")[made.layer]
    builder.buffers("gradients", made.layer, made.device, nbytes, made.first_grad, until)


def download_gradients(builder: ProgramBuilder, table: OpTable, order: Order, made: Made) -> Ints:
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
    hold_gradients(builder, table, made, downloads)
    return downloads


def update_ns(table: OpTable, layer: Ints, rate: Ints) -> NDArray[np.int64]:
    """How long updates of these layers take at so many parameters a second (0: no time)."""
    params = np.array([each.params_to_update for each in table.work.trace.layers], dtype=object)
    return np.array(
        [
            ceil(n * 10**9 / r) if r else 0
            for n, r in zip(params[layer], rate.tolist(), strict=True)
        ],
        dtype=np.int64,
    )


def device_rate(table: OpTable, device: Ints) -> Ints:
    """Parameters a second that each device updates."""
    rates = [each.optimizer_params_per_s for each in table.work.machine.devices]
    return np.array(rates, dtype=np.int64)[device]


def hold_room(
    builder: ProgramBuilder, table: OpTable, layer: Ints, device: Ints, updates: Ints
) -> None:
    """What updates need on a device while they run."""
    nbytes = table.work.layer_bytes("update_workspace_bytes")[layer]
    builder.buffers("workspace", layer, device, nbytes, updates, updates)
