"""What Python does meanwhile: a step is not held up, and a closed trainer leaves nothing behind."""

import gc
import sys
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

import roundel
from roundel.executor.undisturbed import SWITCH_S, undisturbed

from . import toy


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("policy", toy.every_policy(), ids=repr)
def test_a_closed_trainer_lets_go_of_all_at_once(policy: roundel.Policy) -> None:
    """Pinned memory that waits for the collector goes in another trainer's step, and stops it."""
    with roundel.Trainer(
        toy.blocks(),
        nn.functional.mse_loss,
        policy=policy,
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=4,
        trace=None,
    ) as trainer:
        for batch in toy.vectors():
            trainer.step(*batch)
        assert trainer._ready is not None
        machinery = weakref.ref(trainer._ready.machinery)
    assert machinery() is None


def test_python_is_as_before_when_a_step_has_ended_or_failed() -> None:
    before = sys.getswitchinterval(), gc.get_threshold()
    with pytest.raises(RuntimeError), undisturbed():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert gc.get_threshold()[:2] == before[1][:2]
        assert gc.get_threshold()[2] > 10**9
        raise RuntimeError
    assert (sys.getswitchinterval(), gc.get_threshold()) == before


def test_steps_are_undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Notes(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            seen.append(gc.get_threshold()[2])
            return super().forward(value)

    layers = [*toy.blocks(), Notes(toy.WIDTH, toy.WIDTH).double()]
    with roundel.Trainer(
        layers,
        nn.functional.mse_loss,
        policy=roundel.OneFOneB(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        devices=toy.devices(2),
        microbatches=4,
    ) as trainer:
        trainer.step(*toy.vectors()[0])
    assert seen
    assert min(seen) > 10**9 > gc.get_threshold()[2]
