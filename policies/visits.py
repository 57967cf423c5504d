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
    Resident weights have one visit a step and layer range, streamed ones one a run of ops.
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
        """The first op of each of these visits that works on the layer beside it."""
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
    columns = np.stack((table.device, table.step, table.first, table.stop))
    changes = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
    return np.concatenate(([0], np.cumsum(_between_visits(table, changes))))[: len(table.kind)]


def _between_visits(table: OpTable, changes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of the changes between rows those that do not come inside of a visit.

    Forwards of some layers belong to the visit that begins with the forward of more behind them.
    """
    before, after = np.flatnonzero(changes), np.flatnonzero(changes) + 1
    same = (table.device[before] == table.device[after]) & (table.step[before] == table.step[after])
    both = same & table.is_kind(F)[before] & table.is_kind(F)[after]
    result = changes.copy()
    whole = None
    for row, joins in zip(before[::-1].tolist(), both[::-1].tolist(), strict=True):
        if not joins:
            whole = None
            continue
        whole = whole or (int(table.first[row + 1]), int(table.stop[row + 1]))
        if whole[0] <= table.first[row] and table.stop[row] <= whole[1]:
            result[row] = False
        else:
            whole = None
    return result


def _same_layers(table: OpTable) -> Ints:
    layers = table.work.layers + 1
    place = table.device.astype(np.int64) * table.steps + table.step
    key = (place * layers + table.first) * layers + table.stop
    _, visit = np.unique(key, return_inverse=True)
    return np.asarray(visit)
