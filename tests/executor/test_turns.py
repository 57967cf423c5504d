"""Turns: one at a time, and whoever has waited longest comes next."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import roundel
from roundel.executor import trainer
from roundel.executor.turns import Turns

from . import toy


def test_turns_go_to_whoever_has_waited_longest() -> None:
    turns, order = Turns(), []

    def ask(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    with turns:
        for waiting, thread in enumerate(threads, start=1):
            thread.start()
            while len(turns._waiting) < waiting:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_a_turn_ends_with_an_exception_too() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass


def test_there_is_one_turn_at_a_time() -> None:
    turns, inside, most = Turns(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with turns:
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_who_waits_outside_lets_others_have_the_turn() -> None:
    turns, seen = Turns(), threading.Event()

    def other() -> None:
        with turns:
            seen.set()

    thread = threading.Thread(target=other)
    with turns:
        thread.start()
        assert not seen.wait(0.02)
        with turns.outside():
            assert seen.wait(10)
        assert turns._holder == threading.get_ident()
    thread.join()
    with turns:
        pass


def test_outside_is_nothing_to_who_has_no_turn() -> None:
    turns = Turns()
    with turns.outside():
        assert not turns._taken
    assert not turns._taken


def test_where_none_are_needed_nobody_waits() -> None:
    turns = Turns(needed=False)
    with turns, turns, turns.outside():
        pass


POLICIES = [
    *toy.every_policy(),
    *toy.every_policy(optimizer_on="device", activations="device"),
    *(
        policy(**toy.CUTS, optimizer="stale")
        for policy in (roundel.RoundRobin, roundel.LayerToLayer)
    ),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_lanes_in_turns_train_as_ever(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Turns] = []
    monkeypatch.setattr(trainer, "Turns", lambda needed: held.append(Turns()) or held[-1])
    stale = getattr(policy, "optimizer", "sync") == "stale"
    reference = toy.one_step_stale if stale else toy.plain
    batches, layers = toy.vectors(), toy.blocks()
    expected = reference(toy.blocks(), nn.functional.mse_loss, batches)
    losses, weights = toy.train(layers, nn.functional.mse_loss, batches, policy, race=1)
    torch.testing.assert_close(losses, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights, expected[1], rtol=1e-10, atol=1e-12)
    assert not any(turns._taken or turns._waiting for turns in held)
