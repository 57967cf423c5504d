"""OpTable: the ops of several steps in columns, and who runs which layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import KIND_CODE, KINDS, Ints
from .op import Op
from .plan import Plan
from .work import Work

F, B, I, W, R = (KIND_CODE[kind] for kind in "FBIWR")  # noqa: E741


@dataclass(frozen=True)
class OpTable:
    """One row an op: device after device, on each device in order over all steps.

    `rules` is the plan without its ops, the same in all `steps` steps.
    `group` is `step * microbatches + microbatch`. `*_of` have shape (layers, groups) and hold the
    row that does that work, or -1.
    """

    work: Work
    rules: Plan
    steps: int
    kind: Ints
    first: Ints
    stop: Ints
    group: Ints
    device: Ints

    @classmethod
    def of(cls, plans: Sequence[Plan], work: Work) -> "OpTable":
        """The table of one plan per step."""
        known: dict[tuple[int, int], Ints] = {}
        blocks, devices = [], []
        for device in range(work.devices):
            for step, plan in enumerate(plans):
                ops = plan.devices[device]
                key = (id(plan), device)
                if key not in known:
                    known[key] = _columns(ops)
                block = known[key]
                shift = np.array([0, 0, 0, step * work.microbatches], dtype=np.int32)
                blocks.append(block + shift[:, None])
                devices.append(np.full(len(ops), device, dtype=np.int32))
        kind, first, stop, group = np.concatenate(blocks, axis=1)
        rules = plans[0].without_ops()
        return cls(work, rules, len(plans), kind, first, stop, group, np.concatenate(devices))

    @property
    def groups(self) -> int:
        """Microbatches over all steps."""
        return self.steps * self.work.microbatches

    @property
    def step(self) -> Ints:
        """Step of each row."""
        return self.group // self.work.microbatches

    @property
    def microbatch(self) -> Ints:
        """Microbatch of each row within its step."""
        return self.group % self.work.microbatches

    @cached_property
    def device_start(self) -> Ints:
        """First row of each device, and the number of rows at the end."""
        return np.searchsorted(self.device, np.arange(self.work.devices + 1))

    def op(self, row: int) -> Op:
        """The op of a row, its microbatch counted within its step."""
        return Op(
            KINDS[self.kind[row]],
            int(self.first[row]),
            int(self.stop[row]),
            int(self.group[row]) % self.work.microbatches,
        )

    def is_kind(self, *codes: int) -> NDArray[np.bool_]:
        """Which rows are of one of the kinds."""
        wanted = np.zeros(len(KINDS), dtype=np.bool_)
        wanted[list(codes)] = True
        return wanted[self.kind]

    def cells(self, rows: Ints) -> tuple[Ints, Ints]:
        """Rows repeated once a layer, and the flat (layer, group) cell of each."""
        sizes = self.stop[rows] - self.first[rows]
        repeated = np.repeat(rows, sizes)
        ends = np.cumsum(sizes)
        inside = np.arange(len(repeated)) - np.repeat(ends - sizes, sizes)
        layer = self.first[repeated] + inside
        return repeated, layer * self.groups + self.group[repeated]

    @cached_property
    def forward_of(self) -> Ints:
        """The `F` row of each cell."""
        return self._rows_of(F)

    @cached_property
    def backward_of(self) -> Ints:
        """The row, `B` or `I`, that makes the gradient for the input of each cell."""
        return self._rows_of(B, I)

    @cached_property
    def weight_of(self) -> Ints:
        """The row, `B` or `W`, that ends the backward of each cell."""
        return self._rows_of(B, W)

    @cached_property
    def recompute_of(self) -> Ints:
        """The `R` row of each cell."""
        return self._rows_of(R)

    def _rows_of(self, *codes: int) -> Ints:
        of = np.full((self.work.layers, self.groups), -1, dtype=np.int32)
        rows, cell = self.cells(np.flatnonzero(self.is_kind(*codes)))
        of.reshape(-1)[cell] = rows
        return of

    @cached_property
    def forgets(self) -> NDArray[np.bool_]:
        """Which rows are an `F` that leaves nothing for backward, because an `R` will."""
        again = self.recompute_of[self.first, self.group] >= 0
        return np.asarray(self.is_kind(F) & again)

    @cached_property
    def duration_ns(self) -> NDArray[np.int64]:
        """Nanoseconds of each row, which are as many at least as its launch takes."""
        result = np.zeros(len(self.kind), dtype=np.int64)
        key = 2 * self.kind + self.forgets
        for each in np.unique(key).tolist():
            rows = key == each
            code, forgets = divmod(each, 2)
            layer_ns = self.work.layer_ns(KINDS[code], self.rules.weight_share, bool(forgets))
            total = np.concatenate(([0], np.cumsum(np.array(layer_ns, dtype=np.int64))))
            result[rows] = total[self.stop[rows]] - total[self.first[rows]]
            if code == R:
                result[rows] -= np.array(self.work.spared_ns)[self.stop[rows] - 1]
        return np.maximum(result, self.work.machine.host.task_ns)


def _columns(ops: Sequence[Op]) -> Ints:
    columns = (
        [KIND_CODE[op[0]] for op in ops],
        [op[1] for op in ops],
        [op[2] for op in ops],
        [op[3] for op in ops],
    )
    return np.array(columns, dtype=np.int32).reshape(4, len(ops))
