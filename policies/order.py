"""Order: when each op would run if transfers took no time; and whether a plan can deadlock."""

from dataclasses import dataclass

import numpy as np

from ..traces.errors import InputError
from ..traces.timeline import Ints
from .dag import Dag
from .flows import activation_needs, gradient_needs, loss_needs
from .table import OpTable
from .visits import Visits


@dataclass(frozen=True)
class Order:
    """Ranks in one topological order by time of the ops, (step, layer) updates and step norms.

    `step_end_ns` is when each step's last op would end.
    """

    rank: Ints
    update_rank: Ints
    norm_rank: Ints
    step_end_ns: Ints


def update_lag(table: OpTable) -> int:
    """How many steps later an update is first used: 1 for sync, 2 for stale."""
    return 2 if table.rules.optimizer == "stale" else 1


def order_of(table: OpTable, visits: Visits) -> Order:
    """The order of a complete table. Raises InputError when the ops wait for one another."""
    rows, layers, steps = len(table.kind), table.work.layers, table.steps
    updates = steps * layers
    edges = (_lane_edges(table), *_data_edges(table), *_update_edges(table, visits))
    before, after = (np.concatenate(side) for side in zip(*edges, strict=True))
    duration = np.zeros(rows + updates + steps, dtype=np.int64)
    duration[:rows] = table.duration_ns
    dag = Dag(before, after, duration)
    dag.run_roots()
    if dag.done < len(duration):
        raise InputError(_deadlock(table, dag.blocked()))
    rank = dag.rank()
    return Order(
        rank[:rows],
        rank[rows : rows + updates].reshape(steps, layers),
        rank[rows + updates :],
        _step_ends(table, dag.end_ns[:rows]),
    )


def _step_ends(table: OpTable, end_ns: Ints) -> Ints:
    ends = np.zeros(table.steps, dtype=np.int64)
    np.maximum.at(ends, table.step, end_ns)
    return ends


def _lane_edges(table: OpTable) -> tuple[Ints, Ints]:
    same = np.flatnonzero(table.device[1:] == table.device[:-1])
    return same, same + 1


def _data_edges(table: OpTable) -> list[tuple[Ints, Ints]]:
    edges = []
    for before, after in (activation_needs(table), gradient_needs(table), loss_needs(table)):
        by_lane = (table.device[before] == table.device[after]) & (before < after)
        edges.append((before[~by_lane], after[~by_lane]))
    return edges


def _update_edges(table: OpTable, visits: Visits) -> list[tuple[Ints, Ints]]:
    rows, layers, steps = len(table.kind), table.work.layers, table.steps
    updates = steps * layers
    norm = rows + updates
    makes, made = visits.layers(np.flatnonzero(visits.last_grad >= 0))
    uses, used = visits.layers(np.arange(len(visits.step)))
    source = visits.step[uses] - update_lag(table)
    uses, used, source = (column[source >= 0] for column in (uses, used, source))
    first_use = visits.first_uses(table, uses, used)
    owner = table.work.owner
    update = rows + visits.step[makes] * layers
    edges = [
        (visits.last_grad[makes], update + made),
        (visits.last_grad[makes], update + owner[made]),
        (rows + source * layers + used, first_use),
        (rows + source * layers + owner[used], first_use),
        _tied_edges(table, rows),
        # A layer's updates come one after the other, whichever step's gradients are sooner there.
        (np.arange(rows, rows + updates - layers), np.arange(rows + layers, rows + updates)),
    ]
    if table.rules.clip:
        every = np.arange(steps * layers)
        edges.append((visits.last_grad[makes], norm + visits.step[makes]))
        edges.append((norm + every // layers, rows + every))
    return edges


def _tied_edges(table: OpTable, rows: int) -> tuple[Ints, Ints]:
    """A layer's own update comes before that of the layer that owns what it shares."""
    owner, layers = table.work.owner, table.work.layers
    tied = np.flatnonzero(owner != np.arange(layers))
    step = np.repeat(np.arange(table.steps), len(tied)) * layers + rows
    tied = np.tile(tied, table.steps)
    return step + tied, step + owner[tied]


def _deadlock(table: OpTable, blocked: Ints) -> str:
    rows = blocked[blocked < len(table.kind)]
    devices, heads = np.unique(table.device[rows], return_index=True)
    waits = [
        f"gpu{device} waits at {table.op(int(rows[head]))}"
        for device, head in zip(devices.tolist()[:8], heads.tolist()[:8], strict=True)
    ]
    return f"the plan can deadlock: {', '.join(waits)}"
