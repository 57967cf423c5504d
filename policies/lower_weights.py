"""Lowering, weights: resident for good, or uploaded for a visit and freed after it."""

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints
from .builder import ProgramBuilder
from .chunks import chunked, chunks_of
from .lower_optimizer import home_of
from .order import Order, update_lag
from .table import OpTable
from .updated import Updated
from .visits import Visits


def lower_weights(
    builder: ProgramBuilder, table: OpTable, visits: Visits, order: Order, updated: Updated
) -> None:
    """Add the weights' memory and uploads, and what the ops of a later step wait for."""
    param_bytes = table.work.layer_bytes("param_bytes")
    every = np.arange(table.work.layers)
    if table.rules.weights == "resident":
        builder.buffers("weights", every, home_of(table), param_bytes, -1)
        visit, layer = visits.layers(np.arange(len(visits.step)))
        first = visits.first_row[visit]
        _wait_for_update(builder, table, updated, visits, visit, layer, first)
        return
    stale = table.rules.optimizer == "stale"
    builder.buffers("weights", every, builder.work.devices, param_bytes * (2 if stale else 1), -1)
    _stream(builder, table, visits, order, updated)


def _wait_for_update(
    builder: ProgramBuilder,
    table: OpTable,
    updated: Updated,
    visits: Visits,
    visit: Ints,
    layer: Ints,
    tasks: Ints,
    part: Ints | None = None,
) -> None:
    """part: of the weights that each task brings, which may be there before the others are."""
    source = visits.step[visit] - update_lag(table)
    later = np.flatnonzero(source >= 0)
    cell = source[later], layer[later]
    before = updated.task[cell]
    if part is not None:
        parts = updated.parts[cell]
        before = np.where(parts > 1, before - (parts - 1) + part[later], before)
    builder.depend(before, tasks[later])


def _stream(
    builder: ProgramBuilder, table: OpTable, visits: Visits, order: Order, updated: Updated
) -> None:
    visit, layer, part, nbytes = _chunks(table, visits)
    device = visits.device[visit]
    every, held = visits.layers(np.arange(len(visits.step)))
    used = visits.first_uses(table, every, held)
    _wait_for_update(builder, table, updated, visits, every, held, used)
    uploads = builder.transfers(
        "upload",
        "h2d",
        device,
        first=layer,
        stop=layer + 1,
        microbatch=-1,
        step=visits.step[visit],
        part=part,
        nbytes=nbytes,
        key=_keys(table, visits, order, visit, layer),
    )
    builder.depend(visits.makes_room(visit), uploads)
    _wait_for_update(builder, table, updated, visits, visit, layer, uploads, part)
    builder.depend(uploads, visits.first_uses(table, visit, layer))
    begins = part == 0  # Room for all of a layer is taken then.
    visit, layer = visit[begins], layer[begins]
    device, whole = visits.device[visit], table.work.layer_bytes("param_bytes")[layer]
    ends = visits.last_row[visit]
    buffers = builder.buffers("weights", layer, device, whole, uploads[begins], ends)
    step = visits.step[visit]
    here = updated.visit[step, layer] == visit
    builder.use(buffers[here], updated.task[step[here], layer[here]])


def _chunks(table: OpTable, visits: Visits) -> tuple[Ints, Ints, Ints, NDArray[np.int64]]:
    """(visit, layer, part, bytes) of every upload, a visit's first layer first."""
    visit, layer = visits.layers(np.arange(len(visits.step)))
    order = np.lexsort((layer, visit))
    visit, layer = visit[order], layer[order]
    whole = table.work.layer_bytes("param_bytes")[layer]
    row, part, nbytes = chunked(whole, chunks_of(whole))
    return visit[row], layer[row], part, nbytes


def _keys(table: OpTable, visits: Visits, order: Order, visit: Ints, layer: Ints) -> Ints:
    """Uploads spread over the visit before, but not before the update that they need."""
    before = np.maximum(visit - 1, 0)
    same = (visit >= 1) & (visits.device[before] == visits.device[visit])
    starts = np.flatnonzero(np.diff(visit, prepend=-1))
    sizes = np.diff(np.append(starts, len(visit)))
    share = (np.arange(len(visit)) - np.repeat(starts, sizes)) / np.repeat(sizes, sizes)
    rows = visits.last_row[before] - visits.first_row[before] + 1
    row = visits.first_row[before] + (share * rows).astype(np.int64)
    key = np.where(same, order.rank[row], -1)
    source = visits.step[visit] - update_lag(table)
    later = np.flatnonzero(source >= 0)
    key[later] = np.maximum(key[later], order.update_rank[source[later], layer[later]])
    return key
