"""Resumed training is the uninterrupted one, bit by bit, and goes on under any other policy."""

import copy
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import roundel
from roundel.executor.layers import Layers
from roundel.executor.trainer import Trainer

from . import toy

mse = nn.functional.mse_loss
STALE = roundel.RoundRobin(**toy.CUTS, optimizer="stale")
POLICIES = [
    *(policy for policy in toy.every_policy() if policy.name != "round-robin"),
    roundel.GPipe(optimizer_on="host"),
    *(
        roundel.RoundRobin(**toy.CUTS, optimizer=optimizer, optimizer_on=place)
        for optimizer in ("sync", "stale")
        for place in ("host", "device")
    ),
]


def make(layers: Any, policy: roundel.Policy, devices: int = 3, **options: Any) -> Trainer:
    arguments = {"loss_fn": mse, "optimizer": toy.ADAMW, "microbatches": 4} | options
    return Trainer(layers, policy=policy, devices=toy.devices(devices), **arguments)


def steps(trainer: Trainer, batches: toy.Batches) -> list[float]:
    return [trainer.step(*batch).loss for batch in batches]


def assert_resumes_bitwise(
    folder: Path, layers: Callable[[], Any], batches: toy.Batches, **options: Any
) -> None:
    """Saving changes nothing, and another trainer goes on from there."""
    seeded = {**options, "seed": 7}
    with make(layers(), **seeded) as trainer:
        expected = steps(trainer, batches)
    with make(layers(), **seeded) as trainer:
        got = steps(trainer, batches[:3])
        trainer.save(folder)
        assert got + steps(trainer, batches[3:]) == expected
        weights = trainer.state_dict()
    with make(layers(), **options) as trainer:
        assert trainer.load(folder) == 3
        assert steps(trainer, batches[3:]) == expected[3:]
        for name, each in trainer.state_dict().items():
            assert torch.equal(each, weights[name])


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_resuming_is_bitwise_the_uninterrupted_run(policy: roundel.Policy, tmp_path: Path) -> None:
    blocks = partial(toy.blocks, dropout=0.3)
    assert_resumes_bitwise(tmp_path, blocks, toy.vectors(6), policy=policy)


@pytest.mark.parametrize("policy", [roundel.ZBH1(weight_share=0.5), STALE], ids=repr)
@pytest.mark.parametrize("kind", ["tied", "frozen", "float32 masters", "sgd", "nadam"])
def test_resuming_is_bitwise_with(kind: str, policy: roundel.Policy, tmp_path: Path) -> None:
    def frozen() -> list[nn.Module]:
        layers = toy.blocks()
        layers[2].requires_grad_(False)
        return layers

    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    layers, options = {
        "tied": (toy.tied_model, {"loss_fn": toy.token_loss}),
        "frozen": (frozen, {}),
        "float32 masters": (
            lambda: [each.float() for each in toy.blocks()],
            {"compute_dtype": torch.bfloat16, "loss_fn": lambda a, b: mse(a.float(), b)},
        ),
        "sgd": (toy.blocks, {"optimizer": sgd}),
        "nadam": (toy.blocks, {"optimizer": partial(torch.optim.NAdam, lr=1e-2)}),
    }[kind]
    batches = toy.tokens(6) if kind == "tied" else toy.vectors(6)
    if kind == "float32 masters":
        batches = [(x.bfloat16(), y.float()) for x, y in batches]
    assert_resumes_bitwise(tmp_path, layers, batches, policy=policy, **options)


def test_a_relay_of_policies_and_device_counts_is_plain_training(tmp_path: Path) -> None:
    batches = toy.vectors(12)
    runs = [
        (roundel.GPipe(), 2),
        (roundel.RoundRobin(**toy.CUTS), 3),
        (roundel.ZBH1(weight_share=0.5), 4),
        (roundel.RoundRobin(**toy.CUTS, optimizer_on="device"), 1),
        (roundel.OneFOneB(optimizer_on="host"), 2),
        (roundel.ZBV(weight_share=0.5), 2),
    ]
    losses = []
    for number, (policy, devices) in enumerate(runs):
        with make(toy.blocks(), policy, devices) as trainer:
            if number:
                assert trainer.load(tmp_path) == 2 * number
            losses += steps(trainer, batches[2 * number : 2 * number + 2])
            trainer.save(tmp_path)
    expected = toy.plain(toy.blocks(), mse, batches)[0]
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_stale_run_goes_on_stale_wherever_its_states_are(place: str, tmp_path: Path) -> None:
    batches = toy.vectors(7)
    losses = []
    with make(toy.blocks(), STALE) as trainer:
        losses += steps(trainer, batches[:3])
        trainer.save(tmp_path)
    other = roundel.RoundRobin(
        (8,), (4, 4), optimizer="stale", optimizer_on=place, recompute="late"
    )
    with make(toy.blocks(), other, devices=2) as trainer:
        trainer.load(tmp_path)
        losses += steps(trainer, batches[3:])
    expected = toy.one_step_stale(toy.blocks(), mse, batches)[0]
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)


def test_a_stale_checkpoint_under_a_synchronous_policy_starts_from_the_masters(
    tmp_path: Path,
) -> None:
    batches = toy.vectors(5)
    with make(toy.blocks(), STALE) as trainer:
        steps(trainer, batches[:3])
        path = trainer.save(tmp_path)
        newest = trainer.evaluate(*batches[3])
        going_on = trainer.step(*batches[3]).loss
    assert (path / "older.safetensors").exists()
    with make(toy.blocks(), roundel.OneFOneB()) as trainer:
        trainer.load(tmp_path)
        loss = trainer.step(*batches[3]).loss
        assert not (trainer.save(tmp_path) / "older.safetensors").exists()
    assert loss == pytest.approx(newest, rel=0, abs=1e-12)
    assert abs(loss - going_on) > 1e-6


def test_a_synchronous_checkpoint_under_a_stale_policy_starts_from_the_masters(
    tmp_path: Path,
) -> None:
    batches = toy.vectors(5)
    with make(toy.blocks(), roundel.GPipe()) as trainer:
        steps(trainer, batches[:3])
        trainer.save(tmp_path)
        expected = trainer.evaluate(*batches[3]), trainer.evaluate(*batches[4])
    with make(toy.blocks(), STALE) as trainer:
        trainer.load(tmp_path)
        assert steps(trainer, batches[3:]) == pytest.approx(expected, rel=0, abs=1e-12)


def test_a_checkpoint_that_is_loaded_and_saved_again_without_a_step_is_the_same(
    tmp_path: Path,
) -> None:
    batches = toy.vectors(6)
    with make(toy.blocks(), STALE) as trainer:
        steps(trainer, batches[:3])
        trainer.save(tmp_path / "first")
        expected = steps(trainer, batches[3:])
    with make(toy.blocks(), STALE) as trainer:
        trainer.load(tmp_path / "first")
        trainer.save(tmp_path / "second")
    with make(toy.blocks(), STALE) as trainer:
        trainer.load(tmp_path / "second")
        assert steps(trainer, batches[3:]) == expected


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_run_goes_back_to_where_it_was(policy: roundel.Policy, tmp_path: Path) -> None:
    batches = toy.vectors(5)
    with make(toy.blocks(dropout=0.3), policy) as trainer:
        steps(trainer, batches[:2])
        trainer.save(tmp_path)
        expected = steps(trainer, batches[2:])
        assert trainer.load(tmp_path) == 2
        assert steps(trainer, batches[2:]) == expected


def test_a_checkpoint_from_before_the_first_step(tmp_path: Path) -> None:
    batches = toy.vectors(3)
    with make(toy.blocks(), STALE) as trainer:
        assert trainer.save(tmp_path).name == "step-00000000"
        expected = steps(trainer, batches)
    layers = [copy.deepcopy(each) for each in toy.blocks()]
    for each in layers:
        nn.init.zeros_(each[0].weight)
    with make(layers, STALE) as trainer:
        assert trainer.load(tmp_path) == 0
        assert steps(trainer, batches) == expected


def test_a_run_goes_back_to_before_its_first_step(tmp_path: Path) -> None:
    batches = toy.vectors(3)
    with make(toy.blocks(), roundel.GPipe()) as trainer:
        trainer.save(tmp_path)
        expected = steps(trainer, batches)
        assert trainer.load(tmp_path) == 0
        assert steps(trainer, batches) == expected


def test_layers_may_be_cut_otherwise_and_come_in_another_order(tmp_path: Path) -> None:
    """The optimizer's state goes by name: eight layers become four, the optimizer's last first."""
    batches = toy.vectors(5)
    groups = lambda named: [{"params": list(named.values())}]  # noqa: E731
    backwards = lambda named: [{"params": [*named.values()][::-1]}]  # noqa: E731
    with make(toy.blocks(), roundel.GPipe(), parameter_groups=groups) as trainer:
        losses = steps(trainer, batches[:2])
        trainer.save(tmp_path)
    pairs = [nn.Sequential(a, b) for a, b in zip(*[iter(toy.blocks())] * 2, strict=True)]
    names = [
        {f"{part}.{name}": f"{2 * number + part}.{name}" for part in range(2) for name in names}
        for number, pair in enumerate(pairs)
        for names in [dict(pair[0].named_parameters())]
    ]
    layers = Layers(pairs, names)
    with make(layers, roundel.OneFOneB(), parameter_groups=backwards) as trainer:
        trainer.load(tmp_path)
        losses += steps(trainer, batches[2:])
    expected = toy.plain(toy.blocks(), mse, batches)[0]
    assert losses == pytest.approx(expected, rel=0, abs=1e-12)


def test_parameter_groups_and_a_scheduler_of_the_users_own(tmp_path: Path) -> None:
    batches = toy.vectors(6)

    def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        bias = [each for name, each in named.items() if name.endswith("bias")]
        rest = [each for name, each in named.items() if not name.endswith("bias")]
        return [{"params": rest, "weight_decay": 0.3}, {"params": bias, "weight_decay": 0.0}]

    def run(trainer: Trainer, scheduler: Any, batches: toy.Batches) -> list[float]:
        losses = []
        for batch in batches:
            losses.append(trainer.step(*batch).loss)
            scheduler.step()
        return losses

    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.3)
    with make(toy.blocks(), roundel.GPipe(), parameter_groups=groups) as trainer:
        scheduler = schedule(trainer.optimizer)
        run(trainer, scheduler, batches[:3])
        trainer.save(tmp_path)
        state = scheduler.state_dict()
        expected = run(trainer, scheduler, batches[3:])
    with make(toy.blocks(), STALE, parameter_groups=groups) as trainer:
        scheduler = schedule(trainer.optimizer)
        trainer.load(tmp_path)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.3e-2] * 2
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    with make(toy.blocks(), roundel.GPipe(), parameter_groups=groups) as trainer:
        scheduler = schedule(trainer.optimizer)
        trainer.load(tmp_path)
        scheduler.load_state_dict(state)
        assert run(trainer, scheduler, batches[3:]) == expected


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.normal()), torch.rand(()).item()

    with make(toy.blocks(), roundel.GPipe()) as trainer:
        trainer.save(tmp_path)
        expected = draw()
        draw()
        trainer.load(tmp_path)
        assert draw() == expected


def test_measured_costs_come_along_to_the_same_conditions(tmp_path: Path) -> None:
    with make(toy.blocks(), roundel.GPipe()) as trainer:
        trainer.step(*toy.vectors()[0])
        trainer.save(tmp_path)
    for options, size, kept in (({}, 11, True), ({"microbatches": 5}, 11, False), ({}, 22, False)):
        with make(toy.blocks(), roundel.OneFOneB(), **options) as other:
            other.load(tmp_path)
            assert other.trace is None
            other.step(*toy.vectors(size=size)[0])
            assert (other.trace == trainer.trace) is kept


def test_weights_of_another_dtype_take_their_optimizer_state_along(tmp_path: Path) -> None:
    batches = toy.vectors(3)
    with make(toy.blocks(), roundel.GPipe()) as trainer:
        steps(trainer, batches[:2])
        trainer.save(tmp_path)
        expected = trainer.step(*batches[2]).loss
    with make([each.float() for each in toy.blocks()], roundel.GPipe()) as trainer:
        trainer.load(tmp_path)
        loss = trainer.step(*(each.float() for each in batches[2])).loss
        trainer.flush()
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert {each.dtype for each in states} == {torch.float32}
