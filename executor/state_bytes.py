"""How much an optimizer keeps of each parameter, found out on a small one."""

import math

import torch
from torch import Tensor, nn

from .masters import OptimizerFactory

COUNT = 2**14
"""Parameters to try it on: so many that what is kept once does not count."""


def state_bytes(
    optimizer: OptimizerFactory,
    weights: torch.dtype,
    compute: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> float:
    """Bytes of state a parameter, its master copy included where the devices' dtype is another.

    In sixteenths: states of few bits have a scale besides, for so many of them. `device`: where it
    is tried.
    """
    parameter = nn.Parameter(torch.zeros(128, COUNT // 128, dtype=weights, device=device))
    parameter.grad = torch.zeros_like(parameter)
    tried = optimizer([parameter])
    tried.step()
    kept = sum(map(_stored_bytes, tried.state[parameter].values()))
    master = weights.itemsize if compute not in (None, weights) else 0
    return math.ceil(16 * (kept / COUNT - 0.01)) / 16 + master


def _stored_bytes(value: object) -> int:
    """Bytes of a tensor; of one that is made of others, such as a quantised one, of those."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_stored_bytes(getattr(value, name)) for name in names)
    return value.nbytes
