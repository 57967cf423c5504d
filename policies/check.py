"""check_plan: refuses a plan that misses or repeats work, breaks a dependency or can deadlock."""

from collections.abc import Sequence

import numpy as np

from ..traces.errors import InputError
from ..traces.timeline import KINDS, Ints
from .flows import BACKWARD_SIDE, saved_by
from .op import OP_KINDS, Op
from .order import order_of
from .plan import Plan
from .table import B, F, I, OpTable, R, W
from .visits import Visits
from .work import Work

MOST_OPS = 20_000_000
_KINDS = frozenset(OP_KINDS)


def check_plan(plan: Plan, work: Work) -> None:
    """Raises InputError naming the first op that is wrong."""
    check_ops(plan, work)
    table = OpTable.of((plan,), work)
    check_table(table)
    visits = Visits.of(table)
    check_visits(table, visits)
    order_of(table, visits)


def check_ops(plan: Plan, work: Work) -> None:
    """Every op alone: known kind, layers and microbatch that are there."""
    if not isinstance(plan.devices, tuple | list) or len(plan.devices) != work.devices:
        count = len(plan.devices) if isinstance(plan.devices, tuple | list) else "no"
        raise InputError(f"the plan is for {count} devices, the machine has {work.devices}")
    if plan.clip and plan.weights == "streamed" and plan.optimizer_on == "device":
        raise InputError(
            "clip with streamed weights needs optimizer_on host: "
            "the norm is known only after the states have left the device"
        )
    if plan.optimizer == "stale" and plan.weights == "resident":
        raise InputError("a stale optimizer needs streamed weights; use optimizer sync")
    for device, ops in enumerate(plan.devices):
        if not isinstance(ops, tuple | list):
            raise InputError(f"gpu{device}: its ops must be a tuple, not {type(ops).__name__}")
        for op in ops:
            _check_op(device, op, work)


def _check_op(device: int, op: Op, work: Work) -> None:
    try:
        kind, first, stop, microbatch = op
        whole = type(first) is type(stop) is type(microbatch) is int
    except (TypeError, ValueError):
        whole = False
    if not whole or kind not in _KINDS:
        raise InputError(
            f"gpu{device}: not an op: {tuple(op) if isinstance(op, tuple) else op!r}; it must be "
            f"Op(kind, first, stop, microbatch), a kind of {OP_KINDS} and whole numbers"
        )
    if not (0 <= first < stop <= work.layers and 0 <= microbatch < work.microbatches):
        raise InputError(_out_of_range(device, Op(*op), work))


def check_size(plans: Sequence[Plan], work: Work) -> None:
    """Refuses what would take hours, or times that do not fit in 64 bits."""
    ops = sum(len(ops) for plan in plans for ops in plan.devices)
    if ops > MOST_OPS:
        raise InputError(f"{ops:,} ops are too many; {MOST_OPS:,} at most: fewer steps or devices")
    forward_only = work.layer_ns("F", forgets=True)
    longest = max(sum(forward_only), *(sum(work.layer_ns(kind, 0.5)) for kind in "FBR"))
    hops = (work.machine.hop_ns or 0) * max(1, ops)
    if 3 * longest * work.microbatches * len(plans) + hops > 2**62:
        raise InputError("all the work together takes too long for 64 bits of nanoseconds")


def check_table(table: OpTable) -> None:
    """The ops together: complete, nothing twice, saved tensors where the backward needs them."""
    for codes, cells in (
        ((F,), table.forward_of),
        ((B, I), table.backward_of),
        ((B, W), table.weight_of),
        ((R,), table.recompute_of),
    ):
        _check_not_repeated(table, codes, cells)
        if codes != (R,):
            _check_complete(table, codes, cells)
    _check_saved(table)
    _check_recompute_is_used(table)
    if table.rules.weights == "resident":
        _check_one_home(table)


def check_visits(table: OpTable, visits: Visits) -> None:
    """Streamed weights leave with their visit, and what was saved with them is of no use then."""
    if table.rules.weights == "resident":
        return
    rows = np.flatnonzero(table.is_kind(*BACKWARD_SIDE, W))
    apart = visits.of_rows(saved_by(table, rows)) != visits.of_rows(rows)
    if apart.any():
        row = int(rows[np.argmax(apart)])
        raise InputError(
            f"{_name(table, row)}: the F or R that it works from is in an earlier visit, whose "
            "streamed weights are gone; put an R of the same layers before it, with only ops of "
            "these layers in between, or keep the weights resident"
        )


def _out_of_range(device: int, op: Op, work: Work) -> str:
    return (
        f"gpu{device}: {op}: layers must lie in 0:{work.layers} "
        f"and the microbatch in 0 to {work.microbatches - 1}"
    )


def _name(table: OpTable, row: int) -> str:
    return f"{table.op(row)} on gpu{int(table.device[row])}"


def _check_not_repeated(table: OpTable, codes: tuple[int, ...], cells: Ints) -> None:
    rows, cell = table.cells(np.flatnonzero(table.is_kind(*codes)))
    lost = np.flatnonzero(cells.reshape(-1)[cell] != rows)
    if len(lost):
        row, other = int(rows[lost[0]]), int(cells.reshape(-1)[cell[lost[0]]])
        layer = int(cell[lost[0]]) // table.groups
        raise InputError(
            f"{_name(table, row)} repeats work: layer {layer} of this microbatch "
            f"is also done by {_name(table, other)}"
        )


def _check_complete(table: OpTable, codes: tuple[int, ...], cells: Ints) -> None:
    missing = np.argwhere(cells < 0)
    if len(missing):
        layer, group = missing[0].tolist()
        kinds = " or ".join(KINDS[code] for code in codes)
        raise InputError(
            f"the plan misses work: no {kinds} of layer {layer} "
            f"for microbatch {group % table.work.microbatches}"
        )


def _check_saved(table: OpTable) -> None:
    rows = np.flatnonzero(table.is_kind(*BACKWARD_SIDE))
    _check_same_layers(table, rows, saved_by(table, rows), "an F or R")
    weights = np.flatnonzero(table.is_kind(W))
    inputs = table.backward_of[table.first[weights], table.group[weights]]
    _check_same_layers(table, weights, inputs, "an I")


def _check_same_layers(table: OpTable, rows: Ints, sources: Ints, what: str) -> None:
    good = (
        (table.device[sources] == table.device[rows])
        & (table.first[sources] == table.first[rows])
        & (table.stop[sources] == table.stop[rows])
        & (sources < rows)
    )
    if not good.all():
        row = int(rows[np.argmin(good)])
        raise InputError(
            f"{_name(table, row)} has nothing to work from: it needs {what} of the same layers "
            f"and microbatch before it on the same device"
        )


def _check_recompute_is_used(table: OpTable) -> None:
    rows = np.flatnonzero(table.is_kind(R))
    users = table.weight_of[table.first[rows], table.group[rows]]
    unused = table.stop[users] != table.stop[rows]
    if unused.any():
        row = int(rows[np.argmax(unused)])
        raise InputError(f"{_name(table, row)} is not followed by a backward of the same layers")


def _check_one_home(table: OpTable) -> None:
    rows, cell = table.cells(np.arange(len(table.kind)))
    layer = cell // table.groups
    home = np.full(table.work.layers, -1, dtype=np.int64)
    home[layer] = table.device[rows]
    astray = np.flatnonzero(home[layer] != table.device[rows])
    if len(astray):
        row, where = int(rows[astray[0]]), int(layer[astray[0]])
        raise InputError(
            f"{_name(table, row)}: layer {where} also runs on gpu{int(home[where])}; "
            f"resident weights have one home, only streamed weights may move"
        )
