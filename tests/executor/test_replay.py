"""Layers that are recorded and replayed train as they would have: exactly."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor import replay
from roundel.policies.streamed import Streamed
from roundel.traces.machine import ideal_machine

from . import toy
from .test_exact import assert_same, mse, name

CUTS = [
    toy.CUTS,
    {"partition": [1, 7], "backward_partition": [3, 4, 1]},
    {"partition": [8], "backward_partition": [1] * 8},
]
POLICIES = [
    kind(**cuts, optimizer_on=place, activations=waits, optimizer=optimizer, recompute=recompute)
    for kind in (roundel.RoundRobin, roundel.LayerToLayer)
    for cuts in CUTS
    for place, waits, optimizer, recompute in (
        ("host", "host", "sync", "late"),
        ("device", "device", "sync", "early"),
        ("host", "device", "stale", "late"),
    )
]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[replay.Slot]]:
    """The slots that ran a layer, in order; there must be one in the end."""
    slots: list[replay.Slot] = []
    forward = replay.Slot.forward

    def noted(slot: replay.Slot, value: Tensor) -> Tensor:
        slots.append(slot)
        return forward(slot, value)

    monkeypatch.setattr(replay.Slot, "forward", noted)
    yield slots
    assert slots


@pytest.mark.parametrize("policy", POLICIES, ids=name)
@pytest.mark.parametrize("devices", [1, 3])
def test_replayed_layers_train_exactly(
    policy: Streamed, devices: int, replayed: list[replay.Slot]
) -> None:
    """The last microbatch is larger than the others are, and not replayed."""
    batches = toy.vectors(steps=4, size=13)
    reference = toy.one_step_stale if policy.optimizer == "stale" else toy.plain
    got = toy.train(
        toy.blocks(dropout=0), mse, batches, policy, race=1, devices=devices, graphs=True
    )
    assert_same(got, reference(toy.blocks(dropout=0), mse, batches))


def test_layers_are_recorded_when_all_is_quiet(
    monkeypatch: pytest.MonkeyPatch, replayed: list[replay.Slot]
) -> None:
    """While anybody records, torch's allocator forgets who reads memory on other streams."""
    record, pending = replay.Recorder.record, []

    def noted(recorder: replay.Recorder, work: Callable[[], None]) -> Callable[[], None]:
        pending.append(list(trainer._pending))
        return record(recorder, work)

    monkeypatch.setattr(replay.Recorder, "record", noted)
    policy = roundel.RoundRobin(**toy.CUTS, optimizer="stale")
    trainer = roundel.Trainer(
        toy.blocks(),
        mse,
        policy=policy,
        optimizer=toy.ADAMW,
        devices=toy.devices(3),
        microbatches=4,
        machine=ideal_machine(3),
        graphs=True,
    )
    with trainer:
        for batch in toy.vectors(steps=4):
            trainer.step(*batch)
    assert pending
    assert not any(pending)


def test_what_cannot_be_recorded_runs_as_it_would_have() -> None:
    """Its input is a pair of tensors; that is told, and training is exact."""

    class Pair(nn.Module):
        """Takes a tensor or a pair, and gives a pair."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(toy.WIDTH, toy.WIDTH)

        def forward(self, value: Any) -> Any:
            first, second = value if isinstance(value, tuple) else (value, value)
            return self.inner(first), second * 1

    class Join(nn.Module):
        def forward(self, value: Any) -> Tensor:
            return value[0] + value[1]

    def layers() -> list[nn.Module]:
        torch.manual_seed(2)
        return [*(Pair().double() for _ in range(7)), Join()]

    batches = toy.vectors(steps=4)
    policy = roundel.RoundRobin(**toy.CUTS)
    with pytest.warns(UserWarning, match="graphs: layer . runs without one: its input is no"):
        got = toy.train(layers(), mse, batches, policy, race=1, graphs=True)
    assert_same(got, toy.plain(layers(), mse, batches))


def test_layers_are_recorded_under_autocast(replayed: list[replay.Slot]) -> None:
    """Rounding differs without: to bf16's three digits, where here all are the same."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(4)
        return [
            nn.Sequential(nn.Linear(toy.WIDTH, toy.WIDTH), nn.LayerNorm(toy.WIDTH)).float()
            for _ in range(8)
        ]

    batches = [(x.float(), y.float()) for x, y in toy.vectors(steps=4, size=12)]
    policy = roundel.RoundRobin(**toy.CUTS)
    got, expected = (
        toy.train(layers(), mse, batches, policy, autocast=torch.bfloat16, graphs=graphs)
        for graphs in (True, False)
    )
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    plain = toy.train(layers(), mse, batches, policy)
    assert plain[0] != pytest.approx(expected[0], rel=1e-5)


def test_frozen_parameters_and_layers_are_replayed_too(replayed: list[replay.Slot]) -> None:
    """As for LoRA: of each layer one matrix is trained, and of the first ones nothing."""

    def layers() -> list[nn.Module]:
        made = toy.blocks()
        for number, layer in enumerate(made):
            layer[0].requires_grad_(False)
            layer[3].requires_grad_(number > 2)
        return made

    batches = toy.vectors(steps=4)
    policy = roundel.RoundRobin(**toy.CUTS)
    got = toy.train(layers(), mse, batches, policy, race=1, graphs=True)
    assert_same(got, toy.plain(layers(), mse, batches))
