"""The loss of a language model, without a second copy of its logits in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_loss import Projected, summed_loss

IGNORED = -100
"""The target that counts for nothing."""

CHUNK = 2**26
"""Logits that are in float32 at a time."""


def token_loss(output: Tensor | Projected, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., vocabulary) for targets (...); -100 does not count.

    output: the logits, or what they are made from, which needs much less memory. In float32 where
    the logits have fewer bits, a part of them at a time. Where no target counts, the loss is 0.
    """
    targets = targets.flatten()
    counted = targets != IGNORED
    indices = torch.where(counted, targets, 0)
    if isinstance(output, Projected):
        total = summed_loss(output, indices, counted)
    else:
        total = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            output.flatten(0, -2), indices, counted
        )
    return total / counted.sum().clamp(min=1)


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log_softmax(logits)[target]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=_wide(logits), device=logits.device)
        for rows in _chunks(logits):
            logs = torch.log_softmax(logits[rows], 1, dtype=_wide(logits))
            of_target = logs.gather(1, targets[rows, None]).squeeze(1)
            total -= torch.where(counted[rows], of_target, 0).sum()
        ctx.save_for_backward(logits, targets, counted)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, counted = ctx.saved_tensors
        result = torch.empty_like(logits)
        scale = torch.where(counted, grad, 0)[:, None]
        minus_one = grad.new_full((len(logits), 1), -1)
        for rows in _chunks(logits):
            part = torch.softmax(logits[rows], 1, dtype=_wide(logits))
            part.scatter_add_(1, targets[rows, None], minus_one[rows])
            torch.mul(part, scale[rows], out=result[rows])
        return result, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[1])
    return [slice(first, first + size) for first in range(0, len(logits), size)]
