"""The same run twice is the same to the last bit, however the lanes' timing falls out."""

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor.layers import Layers
from roundel.executor.masters import GradientBook

from . import toy


@pytest.mark.parametrize("optimizer", ["sync", "stale"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_rounds_and_tied_weights_are_summed_in_one_order(
    optimizer: str, clip: float | None
) -> None:
    policy = roundel.RoundRobin(
        **toy.CUTS, round_size=2, optimizer=optimizer, clip=clip is not None
    )
    batches = toy.tokens(size=12)

    def run(race: int) -> tuple[list[float], list[Tensor]]:
        layers = [layer.float() for layer in toy.tied_model()]
        layers[-1].project.weight = layers[0].table.weight
        options = {"microbatches": 8, "clip_norm": clip}
        return toy.train(layers, toy.token_loss, batches, policy, race=race, **options)

    first = run(0)
    for race in range(1, 4):
        losses, weights = run(race)
        assert losses == first[0]
        assert all(torch.equal(*pair) for pair in zip(weights, first[1], strict=True))


def test_a_gradient_that_comes_early_waits_for_its_turn() -> None:
    layers = Layers([nn.Linear(1, 1, bias=False)])
    (weight,) = layers.modules[0].parameters()
    # Of these in float32 only the sum from left to right is 1.
    parts = {5: 1e8, 7: -1e8, 9: 1.0}
    for order in ([5, 7, 9], [9, 7, 5], [7, 9, 5]):
        book = GradientBook(layers, [(task, 0) for task in parts])
        for task in order:
            book.add(0, {"weight": torch.tensor([[parts[task]]])}, task)
        assert book.squared_norm() == 1.0
        book.assign(0, None)
        assert weight.grad is not None
        assert weight.grad.item() == 1.0


def test_a_step_leaves_the_random_numbers_as_they_were() -> None:
    layers = toy.blocks(dropout=0.5)
    torch.manual_seed(3)
    expected = torch.rand(2, device=toy.DEVICE)
    torch.manual_seed(3)
    toy.train(layers, nn.functional.mse_loss, toy.vectors(1), roundel.GPipe())
    assert torch.equal(torch.rand(2, device=toy.DEVICE), expected)
