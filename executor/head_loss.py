"""The last projection and the loss in one, so that logits never exist all at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**28
"""Logits that exist at a time: enough rows to keep matrix products fast."""


class Projected(NamedTuple):
    """Logits not yet made: hidden (..., size) times weight (vocabulary, size), transposed."""

    hidden: Tensor
    weight: Tensor

    def logits(self) -> Tensor:
        """All of them, (..., vocabulary)."""
        return torch.nn.functional.linear(self.hidden, self.weight)


def summed_loss(output: Projected, targets: Tensor, counted: Tensor) -> Tensor:
    """The sum of the cross-entropies of the rows that are `counted`, in float32 or wider.

    targets, counted: (rows,). Gradients are made together with the loss, each chunk's while its
    logits are there, and only scaled in backward.
    """
    hidden, weight = output
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total: Tensor = _HeadLoss.apply(hidden.flatten(0, -2), weight, targets, counted)  # type: ignore[no-untyped-call]
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        size = max(1, CHUNK // len(weight))
        for first in range(0, len(hidden), size):
            rows = slice(first, first + size)
            part = torch.log_softmax(hidden[rows] @ weight.T, 1, dtype=wide)
            index, counts = targets[rows, None], counted[rows, None]
            total -= torch.where(counts, part.gather(1, index), 0).sum()
            if for_hidden is None and for_weight is None:
                continue
            part.exp_().scatter_add_(1, index, part.new_full(index.shape, -1)).mul_(counts)
            grad = part.to(hidden.dtype)
            if for_hidden is not None:
                for_hidden[rows] = grad @ weight
            if for_weight is not None:
                for_weight += grad.T @ hidden[rows]
        narrow = None if for_weight is None else for_weight.to(weight.dtype)
        ctx.save_for_backward(for_hidden, narrow)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        made = (None if each is None else each * grad for each in ctx.saved_tensors)
        for_hidden, for_weight = made
        return for_hidden, for_weight, None, None
