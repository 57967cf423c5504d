"""Flows: which op needs the tensor that which other op makes. The one place of this rule."""

import numpy as np

from ..traces.timeline import Ints
from .table import B, F, I, OpTable, R, W


def activation_needs(table: OpTable) -> tuple[Ints, Ints]:
    """(producer row, consumer row) pairs: an `F` or `R` needs the output of the layer before."""
    rows = np.flatnonzero(table.is_kind(F, R) & (table.first > 0))
    return table.forward_of[table.first[rows] - 1, table.group[rows]], rows


def gradient_needs(table: OpTable) -> tuple[Ints, Ints]:
    """(producer row, consumer row) pairs: a `B` or `I` needs the gradient of the layer behind.

    So does an `R` that is to run late.
    """
    kinds = (B, I, R) if table.rules.late_recompute else (B, I)
    rows = np.flatnonzero(table.is_kind(*kinds) & (table.stop < table.work.layers))
    return table.backward_of[table.stop[rows], table.group[rows]], rows


def loss_needs(table: OpTable) -> tuple[Ints, Ints]:
    """(forward row, backward row) pairs: the last layers' backward comes after their forward.

    No tensor passes where a recompute lies between, but the loss must have been there: else an
    update could change weights that the forward still has to read.
    """
    rows = np.flatnonzero(table.is_kind(B, I) & (table.stop == table.work.layers))
    return table.forward_of[table.work.layers - 1, table.group[rows]], rows


def saved_by(table: OpTable, rows: Ints) -> Ints:
    """The row, `R` or else `F`, whose saved tensors each backward-side row works from."""
    recompute = table.recompute_of[table.first[rows], table.group[rows]]
    forward = table.forward_of[table.first[rows], table.group[rows]]
    return np.where(recompute >= 0, recompute, forward)


def keeps_saved(table: OpTable) -> Ints:
    """The rows that leave saved tensors for a backward: every `R`, and every `F` without one."""
    return np.flatnonzero(table.is_kind(F, R) & ~table.forgets)


def last_backward(table: OpTable, rows: Ints) -> Ints:
    """The row, `B` or `W`, that ends the backward of each row's layers and microbatch."""
    return table.weight_of[table.first[rows], table.group[rows]]


BACKWARD_SIDE = (B, I, W)
