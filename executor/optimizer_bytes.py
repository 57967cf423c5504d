"""How much an optimizer keeps of each parameter and needs to update it, found out on small ones."""

import math
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .masters import OptimizerFactory
from .quantised import parts_of
from .slices import MOST, is_by_element

COUNT = 2**14
"""Parameters to try it on: so many that what is kept once does not count."""

ROOM_COUNT = 2**22
"""Parameters to see what an update needs besides: so many that the allocator's steps are small."""


class OptimizerBytes(NamedTuple):
    """Bytes a parameter: of state, the master copy included, and of room for an update on a device.

    `at_once`: what an update needs `room` for: all of a layer's weights together, or the largest
    one, of which it has no more than `most` elements at a time. `converted`: bytes a parameter of
    gradients in the masters' dtype, of all of a layer. `by_rows`: the state of matrices with so
    many rows, where that is another.
    """

    state: float
    room: float = 0.0
    at_once: bool = True
    converted: int = 0
    most: int = sys.maxsize
    by_rows: Mapping[int, float] = MappingProxyType({})

    def of_layer(self, weights: Iterable[Tensor]) -> dict[str, int]:
        """What a layer's cost has that these weights are trained of."""
        weights = list(weights)
        sizes = [each.numel() for each in weights]
        needing = sum(sizes) if self.at_once else min(max(sizes, default=0), self.most)
        states = [self.by_rows.get(rows_of(each), self.state) for each in weights]
        kept = sum(state * size for state, size in zip(states, sizes, strict=True))
        return {
            "optimizer_bytes": round(kept),
            "update_workspace_bytes": round(self.room * needing + self.converted * sum(sizes)),
        }


def optimizer_bytes(
    optimizer: OptimizerFactory,
    weights: torch.dtype,
    compute: torch.dtype | None,
    device: torch.device | str = "cpu",
    rows: Iterable[int] = (),
) -> OptimizerBytes:
    """What an optimizer keeps, and on a GPU also what it needs while it updates.

    State counts in sixteenths: of few bits it has a scale besides, for so many of them. `weights`
    and `compute`: dtypes of the masters and on the devices. `device`: where it is tried, and where
    updates run. `rows`: what matrices there are, for optimizers that treat some in another way.
    """
    device = torch.device(device)
    other = compute not in (None, weights)
    more = weights.itemsize if other else 0
    (parameter,) = _parameters(1, COUNT, weights, device)
    tried = optimizer([parameter])
    state = _state(tried, parameter) + more
    by_rows = {}
    for count in sorted(set(rows) - {0}):
        (parameter,) = _parameters(1, COUNT, weights, device)
        parameter.all_rows = count  # type: ignore[attr-defined]
        by_rows[count] = _state(optimizer([parameter]), parameter) + more
    special = {count: each for count, each in by_rows.items() if each != state}
    if device.type != "cuda":
        return OptimizerBytes(state, by_rows=special)
    one, two = (_room(optimizer, count, weights, device) for count in (1, 2))
    return OptimizerBytes(
        state,
        one / ROOM_COUNT,
        at_once=two > 1.5 * one,
        converted=weights.itemsize * other,
        most=MOST if is_by_element(tried) else sys.maxsize,
        by_rows=special,
    )


def rows_of(weight: Tensor) -> int:
    """The rows of a matrix; 0 of anything else."""
    return weight.shape[0] if weight.ndim == 2 else 0


def _state(tried: Optimizer, parameter: nn.Parameter) -> float:
    """Bytes of state a parameter, after a first step."""
    tried.step()
    tensors = [each for each in tried.state[parameter].values() if isinstance(each, Tensor)]
    kept = sum(part.nbytes for each in tensors for part in parts_of(each))
    return math.ceil(16 * (kept / COUNT - 0.01)) / 16


def _parameters(
    count: int, size: int, dtype: torch.dtype, device: torch.device
) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(128, size // 128, dtype=dtype, device=device))]
    made += [nn.Parameter(torch.zeros_like(made[0])) for _ in range(count - 1)]
    for each in made:
        each.grad = torch.zeros_like(each)
    return made


def _room(optimizer: OptimizerFactory, count: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that an update of so many weights needs on a GPU beside them and their states."""
    steps = optimizer(_parameters(count, ROOM_COUNT, dtype, device))
    steps.step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    steps.step()
    return torch.cuda.max_memory_allocated(device) - before
