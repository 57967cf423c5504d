"""Layers that are recorded and replayed train as they would have: exactly."""

from collections.abc import Iterator

import pytest
from torch import Tensor

import roundel
from roundel.executor import replay
from roundel.policies.streamed import Streamed

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
