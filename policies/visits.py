"""Visits: runs of a device's ops on the same layers, which share one copy of the weights.

A visit may begin with forwards of some of its layers at a time, so that the first ones start when
few of the weights are there.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints
from .table import B, F, OpTable, W

AT_A_TIME = 2
"""Weights, and inputs fetched, of so many visits fit on a device: the one at work and the next."""


@dataclass(frozen=True)
class Visits:
    """One row a visit, in order of device and first op.

    `first_row` and `last_row` are its ops' ends in the OpTable. `first_grad` and `last_grad` are
    its first and last op that makes weight gradients, -1 for a visit that makes none.
    Resident weights have one visit a step and layer range, streamed ones one a run of ops, with the
    forwards of some of its layers that come before.
    """

    device: Ints
    step: Ints
    first: Ints
    stop: Ints
    first_row: Ints
    last_row: Ints
    first_grad: Ints
    last_grad: Ints

    @classmethod
    def of(cls, table: OpTable) -> "Visits":
        """The visits of a table whose plans all treat weights alike."""
        streamed = table.rules.weights == "streamed"
        visit = _runs(table) if streamed else _same_layers(table)
        count = int(visit.max(initial=-1)) + 1
        rows = np.arange(len(visit))
        first_row = np.full(count, len(visit), dtype=np.int64)
        last_row = np.full(count, -1, dtype=np.int64)
        np.minimum.at(first_row, visit, rows)
        np.maximum.at(last_row, visit, rows)
        order = np.argsort(first_row, kind="stable")
        grads = np.flatnonzero(table.is_kind(B, W))
        first_grad = np.full(count, len(visit), dtype=np.int64)
        last_grad = np.full(count, -1, dtype=np.int64)
        np.minimum.at(first_grad, visit[grads], grads)
        np.maximum.at(last_grad, visit[grads], grads)
        first_grad[last_grad < 0] = -1
        start, end = first_row[order], last_row[order]
        return cls(
            table.device[start],
            table.step[start],
            table.first[end],
            table.stop[end],
            start,
            end,
            first_grad[order],
            last_grad[order],
        )

    def layers(self, chosen: Ints) -> tuple[Ints, Ints]:
        """The chosen visits repeated once a layer, and the layers, each visit's last one first."""
        sizes = self.stop[chosen] - self.first[chosen]
        repeated = np.repeat(chosen, sizes)
        ends = np.cumsum(sizes)
        inside = np.arange(len(repeated)) - np.repeat(ends - sizes, sizes)
        return repeated, self.stop[repeated] - 1 - inside

    def first_uses(self, table: OpTable, visit: Ints, layer: Ints) -> Ints:
        """The first op of each of these visits that works on the layer beside it.

        It is among the first few: looks at all visits' first ops, then at those behind them.
        """
        use = self.first_row[visit].copy()
        late = np.arange(len(use))
        while len(late):
            row, wanted = use[late], layer[late]
            late = late[(table.first[row] > wanted) | (table.stop[row] <= wanted)]
            use[late] += 1
        return use

    def makes_room(self, chosen: Ints) -> Ints:
        """The op whose end frees room for what each of the chosen visits brings, or -1."""
        before = np.maximum(chosen - AT_A_TIME, 0)
        same = (chosen >= AT_A_TIME) & (self.device[before] == self.device[chosen])
        return np.where(same, self.last_row[before], -1)

    def of_rows(self, rows: Ints) -> Ints:
        """The visits that ops are of; a visit's are all together where weights are streamed."""
        return np.asarray(np.searchsorted(self.first_row, rows, side="right") - 1)


def _runs(table: OpTable) -> Ints:
    """The visit of each row, where weights are streamed."""
    columns = np.stack((table.device, table.step, table.first, table.stop))
    changes = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
    if not len(table.kind):
        return np.zeros(0, dtype=np.int64)
    run = np.concatenate(([0], np.cumsum(changes)))
    begins = np.flatnonzero(np.concatenate(([True], changes)))
    return np.concatenate(([0], np.cumsum(~_joins_the_next(table, begins))))[run]


def _joins_the_next(table: OpTable, begins: Ints) -> NDArray[np.bool_]:
    """Of runs of ops on the same layers, but the last one: whether it begins the next one's visit.

    So does a run of nothing but forwards of some of the layers, before a forward of all of them,
    or before a run that does, too.
    """
    forward = table.is_kind(F)
    only = np.logical_and.reduceat(forward, begins)
    place = np.stack((table.device, table.step))[:, begins]
    beside = (place[:, 1:] == place[:, :-1]).all(axis=0)
    may = beside & only[:-1] & forward[begins[1:]]
    joins = np.zeros(len(may), dtype=np.bool_)
    first, stop = table.first[begins], table.stop[begins]
    for run in np.flatnonzero(may)[::-1].tolist():
        whole = run + 1
        while whole < len(joins) and joins[whole]:
            whole += 1
        joins[run] = first[whole] <= first[run] and stop[run] <= stop[whole]
    return joins


def _same_layers(table: OpTable) -> Ints:
    layers = table.work.layers + 1
    place = table.device.astype(np.int64) * table.steps + table.step
    key = (place * layers + table.first) * layers + table.stop
    _, visit = np.unique(key, return_inverse=True)
    return np.asarray(visit)
