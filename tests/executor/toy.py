"""Small models in float64, and plain PyTorch training to compare with."""

import copy
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor.trainer import Trainer
from roundel.executor.values import moved
from roundel.traces.machine import ideal_machine

DEVICES = os.environ.get("ROUNDEL_TEST_DEVICE", "cpu").split(",")
"""Where the tests train: `cuda:0`, virtual devices on one GPU; `cuda:0,cuda:1`, on both in turn."""

DEVICE = DEVICES[0]
"""Where the plain training runs that they compare with."""

PLACE = torch.device(DEVICE)
WIDTH, VOCABULARY = 6, 13
ADAMW = partial(torch.optim.AdamW, lr=1e-2)

CUTS = {"partition": (3, 3), "backward_partition": (2, 3, 3)}
"""For the models here, which have eight layers: measured times of such small ones are noise."""

Batches = list[tuple[Any, Any]]


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


class Head(nn.Module):
    """A norm and a projection that shares its weight with the embedding."""

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.project.weight = embed.table.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.project(self.norm(value))


def blocks(count: int = 8, dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(1)
    return [
        nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH)
        ).double()
        for _ in range(count)
    ]


def tied_model() -> list[nn.Module]:
    torch.manual_seed(3)
    embed = Embed().double()
    middle = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(6)]
    head = Head(embed).double()
    head.project.weight = embed.table.weight
    return [embed, *middle, head]


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def vectors(steps: int = 3, size: int = 11) -> Batches:
    """Batches of an uneven size, so that microbatches differ."""
    random_numbers = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, size, WIDTH, generator=random_numbers, dtype=torch.double)
    return [(draw(), draw()) for _ in range(steps)]


def tokens(steps: int = 3, size: int = 10) -> Batches:
    numbers = torch.Generator().manual_seed(1)
    draw = partial(torch.randint, VOCABULARY, (size, 4), generator=numbers)
    return [(draw(), draw()) for _ in range(steps)]


def devices(count: int) -> list[str]:
    """So many devices to train on."""
    return (DEVICES * count)[:count]


def plain(
    layers: list[nn.Module],
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Batches,
    clip: float | None = None,
    optimizer: Any = ADAMW,
) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights of plain training."""
    model = nn.Sequential(*layers).to(DEVICE)
    steps = optimizer([each for each in model.parameters() if each.requires_grad])
    losses = []
    for inputs, targets in batches:
        steps.zero_grad()
        loss = loss_fn(model(moved(inputs, PLACE)), moved(targets, PLACE))
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
        losses.append(loss.item())
    return losses, [each.detach().cpu().clone() for each in model.parameters()]


def one_step_stale(
    layers: list[nn.Module], loss_fn: Callable[[Any, Any], Tensor], batches: Batches
) -> tuple[list[float], list[Tensor]]:
    """Plain training whose gradients are those of the weights before the last update."""
    model = nn.Sequential(*layers)
    older = copy.deepcopy(model)
    steps = ADAMW(model.parameters())
    losses = []
    for inputs, targets in batches:
        older.zero_grad()
        loss = loss_fn(older(inputs), targets)
        loss.backward()
        grads = [each.grad for each in older.parameters()]
        older = copy.deepcopy(model)
        for each, grad in zip(model.parameters(), grads, strict=True):
            each.grad = grad
        steps.step()
        losses.append(loss.item())
    return losses, [each.detach().clone() for each in model.parameters()]


def make(
    layers: list[nn.Module],
    policy: roundel.Policy,
    loss_fn: Callable[[Any, Any], Tensor] = nn.functional.mse_loss,
    *,
    count: int = 2,
    microbatches: int = 4,
    **options: Any,
) -> Trainer:
    """A trainer on `count` devices."""
    options.setdefault("optimizer", ADAMW)
    return Trainer(
        layers,
        loss_fn,
        policy=policy,
        devices=devices(count),
        microbatches=microbatches,
        **options,
    )


def train(
    layers: list[nn.Module],
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Batches,
    policy: roundel.Policy,
    *,
    race: int | None = None,
    devices: int = 3,
    microbatches: int = 4,
    **options: Any,
) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights of training by a policy; `race` is a seed of random delays."""
    # Measuring a GPU's links takes longer than the few small steps.
    options.setdefault("machine", ideal_machine(devices))
    with make(
        layers, policy, loss_fn, count=devices, microbatches=microbatches, **options
    ) as trainer:
        if race is not None:
            make_races_likely(trainer, race)
        losses = [trainer.step(*batch).loss for batch in batches]
        trainer.flush()
        weights = [each.detach().cpu().clone() for each in nn.Sequential(*layers).parameters()]
    return losses, weights


def make_races_likely(trainer: Trainer, seed: int, most_s: float = 0.002) -> None:
    """Random delays before every task, and freed copies overwritten with NaN."""
    numbers = random.Random(seed)

    def around(run: Callable[[int], None]) -> Callable[[int], None]:
        def delayed(task: int) -> None:
            time.sleep(numbers.random() * most_s)
            run(task)

        return delayed

    trainer._around = around
    trainer._poison = True


def every_policy(**knobs: Any) -> list[roundel.Policy]:
    """All policies of the library, each with those of the knobs that it has."""
    policies = []
    for name in roundel.POLICIES:
        known = roundel.policies.catalog.known_knobs(name)
        mine = {knob: value for knob, value in knobs.items() if knob in known}
        if "weight_share" in known:
            mine["weight_share"] = 0.5
        if name in ("round-robin", "layer-to-layer"):
            if mine.get("recompute") == "none":
                continue
            mine |= CUTS
        policies.append(roundel.make_policy(name, **mine))
    return policies


def torchao_optimizers() -> Any:
    """torchao's optimizers, which are compiled; the test is skipped where that cannot be."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torchao's optimizers need a C++ compiler")
    return pytest.importorskip("torchao.optim")
