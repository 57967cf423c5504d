"""Deferred weight gradients: what `I` leaves for `W` (zero bubble, arXiv 2401.10241)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linears import Job, apply_linear, is_plain, top_of_hooks

_active = threading.local()


@contextmanager
def collecting(jobs: list[Job]) -> Iterator[None]:
    """Linear layers run in here put off their weight gradients: each becomes a job in `jobs`."""
    _active.jobs = jobs
    try:
        yield
    finally:
        _active.jobs = None


def jobs_here() -> list[Job] | None:
    """Where weight gradients that are put off become jobs; None: they are not."""
    return getattr(_active, "jobs", None)


def defer_linears(module: nn.Module) -> None:
    """Let `module`'s plain linear layers put off their weight gradients where that is asked for."""
    for part in module.modules():
        if is_plain(part):
            part.forward = _forward_of(part)  # type: ignore[method-assign, assignment]


def _forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        jobs = jobs_here()
        wanted = linear.weight.requires_grad and torch.is_grad_enabled()
        # What runs in a checkpoint must do in backward what it did before.
        if jobs is None or not wanted or top_of_hooks() is not None:
            return functional.linear(input, linear.weight, linear.bias)
        return apply_linear(linear, input, jobs)

    return forward
