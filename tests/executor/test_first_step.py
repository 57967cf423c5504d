"""A first step takes memory on the host for all that comes down, which is slow."""

import time

import pytest
from torch import Tensor, nn

import roundel
from roundel.executor import host_pool
from roundel.executor.host_memory import host_bytes
from roundel.traces.timeline import Span

from ..costs import make_machine, make_trace
from . import toy

SLOW_S = 0.02


def test_no_more_waits_on_a_device_than_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops would run away from what they have made, which is to wait on the host."""

    def slow(nbytes: int, pin: bool) -> Tensor:
        time.sleep(SLOW_S)
        return host_bytes(nbytes, pin)

    monkeypatch.setattr(host_pool, "host_bytes", slow)
    batches = [
        (inputs[:size], targets[:size])
        for size, (inputs, targets) in zip((20, 20, 10), toy.vectors(3, size=20), strict=True)
    ]
    sizes = {"param_bytes": 8, "grad_bytes": 8, "output_bytes": 8}
    policy = roundel.LayerToLayer(partition=(4, 4), backward_partition=(4, 4))
    layers = [nn.Linear(toy.WIDTH, toy.WIDTH).double() for _ in range(8)]
    with toy.make(
        layers,
        policy,
        count=1,
        microbatches=10,
        trace=make_trace([(10**6, 10**6, 10**6)] * 8, **sizes),
        machine=make_machine(1, 10**12),
    ) as trainer:
        first, second, other = (list(trainer.step(*batch).timeline.spans()) for batch in batches)
    assert most_ahead(first) <= 2
    assert most_ahead(other) <= 2, "a batch of another size gets places of its own"
    assert offloads_of(second)[-1].end_ns < offloads_of(first)[-1].end_ns / 2


def offloads_of(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span.kind == "offload"]


def most_ahead(spans: list[Span]) -> int:
    """By how many ops the first visit was ahead of what is on its way to the host."""
    ops = [span for span in spans if span.kind == "F" and span.first == 0]
    down = {span.microbatch: span.end_ns for span in offloads_of(spans) if span.stop == 4}
    assert len(ops) == len(down) == 10
    return max(
        number - sum(end <= op.start_ns for end in down.values()) for number, op in enumerate(ops)
    )
