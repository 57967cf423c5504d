"""Deferred weight gradients: what `I` leaves for `W` (zero bubble, arXiv 2401.10241)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Job = Callable[[], None]

_active = threading.local()


@contextmanager
def collecting(jobs: list[Job]) -> Iterator[None]:
    """Linear layers run in here put off their weight gradients: each becomes a job in `jobs`."""
    _active.jobs = jobs
    try:
        yield
    finally:
        _active.jobs = None


def defer_linears(module: nn.Module) -> None:
    """Let the linear layers of `module` put off their weight gradients where that is asked for."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = _forward_of(part)  # type: ignore[method-assign, assignment]


def _is_checkpointed() -> bool:
    """Whether this runs inside torch.utils.checkpoint, which runs it again in backward.

    What it does then must be what it did before: a weight gradient in there is not put off.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None


def _forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(value: Tensor) -> Tensor:
        jobs = getattr(_active, "jobs", None)
        wanted = linear.weight.requires_grad and torch.is_grad_enabled()
        if jobs is None or not wanted or _is_checkpointed():
            return functional.linear(value, linear.weight, linear.bias)
        if torch.is_autocast_enabled(value.device.type):
            dtype = torch.get_autocast_dtype(value.device.type)
            cast = [
                None if each is None else each.to(dtype) for each in (linear.weight, linear.bias)
            ]
            return _DeferredLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
                value.to(dtype), *cast, linear.weight, linear.bias, jobs
            )
        both = (linear.weight, linear.bias)
        return _DeferredLinear.apply(value, *both, *both, jobs)  # type: ignore[no-any-return, no-untyped-call]

    return forward


class _DeferredLinear(torch.autograd.Function):
    """A linear layer whose backward makes the input's gradient and leaves the weights' as a job."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        bias_leaf: Tensor | None,
        jobs: list[Job],
    ) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.leaves, ctx.jobs = (leaf, bias_leaf), jobs
        return functional.linear(value, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, weight = ctx.saved_tensors
        value = value.detach()  # The job has no use for the graph before it.
        leaf, bias_leaf = ctx.leaves

        def job() -> None:
            flat = grad.reshape(-1, grad.shape[-1])
            _collect(leaf, flat.t() @ value.reshape(-1, value.shape[-1]))
            if bias_leaf is not None and bias_leaf.requires_grad:
                _collect(bias_leaf, flat.sum(0))

        ctx.jobs.append(job)
        needed = ctx.needs_input_grad[0]
        return (grad @ weight if needed else None, None, None, None, None, None)


@torch.no_grad()
def _collect(leaf: Tensor, grad: Tensor) -> None:
    grad = grad.to(leaf.dtype)
    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
