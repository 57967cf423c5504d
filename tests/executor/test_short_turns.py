"""Python meanwhile: short turns in a step, and nothing left behind by a closed trainer."""

import gc
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

import roundel
from roundel.executor.short_turns import SWITCH_S, short_turns

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
    ) as trainer:
        for batch in toy.vectors():
            trainer.step(*batch)
        assert trainer._ready is not None
        machinery = weakref.ref(trainer._ready.machinery)
    assert machinery() is None


def test_turns_are_as_before_when_a_step_has_ended_or_failed() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(RuntimeError), short_turns():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        raise RuntimeError
    assert sys.getswitchinterval() == before


def test_two_trainers_may_step_at_the_same_time() -> None:
    before, entered, leave = sys.getswitchinterval(), threading.Event(), threading.Event()

    def other() -> None:
        with short_turns():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with short_turns():
        thread.start()
        entered.wait()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    leave.set()
    thread.join()
    assert sys.getswitchinterval() == before
