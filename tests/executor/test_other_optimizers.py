"""Optimizers that are not torch's own: with attributes, random numbers and states of their own."""

from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import roundel
from roundel.executor.decoder import decoder_layers
from roundel.executor.presets import PRESETS
from roundel.executor.text import TextBatches, load_tokens
from roundel.executor.token_loss import token_loss
from roundel.executor.trainer import Trainer

from . import toy

mse = nn.functional.mse_loss


class Shaken(torch.optim.SGD):
    """SGD with noise, as strong as an attribute says that no group has."""

    drawn: ClassVar[list[float]] = []

    def __init__(self, params, lr: float) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, lr=lr)
        self.strength = 1e-3

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[no-untyped-def, override]
        super().step()
        for group in self.param_groups:
            for each in group["params"]:
                noise = self.strength * torch.rand(each.shape, device=each.device)
                self.drawn.append(float(noise.flatten()[0]))
                each.add_(noise)


def run(policy: roundel.Policy, race: int) -> tuple[list[float], list[float]]:
    Shaken.drawn = []
    layers = toy.blocks(dropout=0.3)
    torch.manual_seed(7)
    optimizer = partial(Shaken, lr=0.1)
    losses, _ = toy.train(layers, mse, toy.vectors(4), policy, race=race, optimizer=optimizer)
    return losses, sorted(Shaken.drawn)


@pytest.mark.parametrize(
    "policy",
    [
        roundel.OneFOneB(),
        roundel.RoundRobin(**toy.CUTS),
        roundel.RoundRobin(**toy.CUTS, optimizer="stale"),
        roundel.RoundRobin(**toy.CUTS, optimizer_on="device"),
    ],
    ids=repr,
)
def test_noise_in_updates_is_new_every_step_and_the_same_every_run(policy: roundel.Policy) -> None:
    first = run(policy, race=0)
    assert len(set(first[1])) == len(first[1])
    assert run(policy, race=1) == first


def test_eight_bit_states_and_stochastic_rounding_follow_float32(tmp_path: Path) -> None:
    """torchao's AdamW on bf16 weights without float32 masters: 4 bytes a parameter, not 16."""
    torchao = toy.torchao_optimizers()
    tokens = load_tokens("python-stdlib", None)
    batches = TextBatches(tokens[: 2**20], 16, 64, held_out=0.1)

    def trainer(dtype: torch.dtype, optimizer: object) -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            decoder_layers(PRESETS["decoder-tiny"].shape, dtype=dtype),
            token_loss,
            policy=roundel.RoundRobin(partition=(4,), backward_partition=(2, 2, 2)),
            optimizer=optimizer,  # type: ignore[arg-type]
            devices=toy.devices(2),
            microbatches=2,
            seed=0,
        )

    def held_out(each: Trainer) -> float:
        losses = [each.evaluate(*pair) for pair in batches.held_out(4, 16)]
        return sum(losses) / len(losses)

    low = partial(torchao.AdamW8bit, lr=2e-3, weight_decay=0.01, bf16_stochastic_round=True)
    with trainer(torch.float32, partial(torch.optim.AdamW, lr=2e-3)) as full:
        for step in range(60):
            full.step(*batches.batch(step))
        expected = held_out(full)
    with trainer(torch.bfloat16, low) as narrow:
        before = held_out(narrow)
        for step in range(60):
            narrow.step(*batches.batch(step))
            if step == 56:
                narrow.save(tmp_path)
        losses = [narrow.step(*batches.batch(step)).loss for step in (60, 61)]
        assert held_out(narrow) < expected + 0.1 < before - 1.0
    with trainer(torch.bfloat16, low) as again:
        assert again.load(tmp_path) == 57
        for step in range(57, 60):
            again.step(*batches.batch(step))
        assert [again.step(*batches.batch(step)).loss for step in (60, 61)] == losses
