"""Linear layers by hand: weight gradients may be put off, and the product itself be left out."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

Job = Callable[[], None]

Made = Callable[[Tensor, torch.Size], Tensor]
"""An output of a shape, like another tensor, without the product: what is in it is not needed."""

_FORWARD = nn.Linear.forward


def apply_linear(
    linear: nn.Linear, value: Tensor, jobs: list[Job] | None, made: Made | None = None
) -> Tensor:
    """What `linear` makes of `value`, or what is `made` instead; gradients are its own either way.

    jobs: where the weight gradients become a job; None: they are made in backward.
    """
    leaf, bias_leaf = linear.weight, linear.bias
    weight: Tensor = leaf
    bias: Tensor | None = bias_leaf
    if torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
        value, weight = _cast(value, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    return _Linear.apply(value, weight, bias, leaf, bias_leaf, jobs, made)  # type: ignore[no-any-return, no-untyped-call]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does, which leaves float64 alone."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def is_plain(part: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is an nn.Linear and does just that: no subclass, hooks or own forward."""
    hooks = (each for name, each in vars(part).items() if name.endswith("hooks"))
    own = "forward" in vars(part) or type(part).forward is not _FORWARD
    return type(part) is nn.Linear and not own and not any(hooks)


def top_of_hooks() -> object:
    """What packs saved tensors here. Inside torch.utils.checkpoint it is another than outside.

    What runs in there runs again in backward, and has to do then what it did before.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


class _Linear(torch.autograd.Function):
    """A linear layer, as torch's own to the bit."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        bias_leaf: Tensor | None,
        jobs: list[Job] | None,
        made: Made | None,
    ) -> Tensor:
        of_value, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(value if of_weight else None, weight if of_value else None)
        ctx.leaves, ctx.jobs = (leaf, bias_leaf), jobs
        if made is not None:
            return made(value, torch.Size((*value.shape[:-1], len(weight))))
        return functional.linear(value, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_value, of_weight, of_bias, *_ = ctx.needs_input_grad

        def weight_grad(value: Tensor) -> Tensor:
            return flat.t() @ value.reshape(-1, value.shape[-1])

        result = grad @ weight if of_value else None
        if ctx.jobs is not None:
            leaf, bias_leaf = ctx.leaves
            apart = value.detach()  # A job has no use for the graph before it.

            def job() -> None:
                _collect(leaf, weight_grad(apart))
                if bias_leaf is not None and bias_leaf.requires_grad:
                    _collect(bias_leaf, flat.sum(0))

            ctx.jobs.append(job)
            return (result, *[None] * 6)
        of = (weight_grad(value) if of_weight else None, flat.sum(0) if of_bias else None)
        return (result, *of, None, None, None, None)


@torch.no_grad()
def _collect(leaf: Tensor, grad: Tensor) -> None:
    grad = grad.to(leaf.dtype)
    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
