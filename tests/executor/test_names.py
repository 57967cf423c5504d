"""Parameters have the model's own names, and modules may be in a layer twice."""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from torch import nn

import roundel

from . import toy

mse = nn.functional.mse_loss
make = partial(toy.make, policy=roundel.RoundRobin((1,), (2, 1)), microbatches=2)


def named() -> nn.Sequential:
    torch.manual_seed(0)
    size = toy.WIDTH
    parts = {"enc": nn.Linear(size, size), "act": nn.LayerNorm(size), "dec": nn.Linear(size, size)}
    parts["act"].register_buffer("kept", torch.ones(3))
    return nn.Sequential(OrderedDict(parts)).double()


def test_a_sequentials_names_are_its_own(tmp_path: Path) -> None:
    model, again = named(), named()
    with make(model) as trainer:
        for batch in toy.vectors(2):
            trainer.step(*batch)
        state = trainer.state_dict()
        trainer.save(tmp_path)
    assert state.keys() == again.state_dict().keys()
    again.load_state_dict(state)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.cpu(), other.cpu())
    with make(named()) as trainer:
        assert trainer.load(tmp_path) == 2


class Twice(nn.Module):
    """The same submodule under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(toy.WIDTH, toy.WIDTH).double()
        self.second = self.first

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(value)))  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Twice(), Twice(), nn.Linear(toy.WIDTH, toy.WIDTH).double())


def test_a_submodule_with_two_names_trains_as_one() -> None:
    batches = toy.vectors(2)
    trained = model()
    with make(trained) as trainer:
        losses = [trainer.step(*batch).loss for batch in batches]
        trainer.flush()
    expected, weights = toy.plain(list(model()), mse, batches)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    for mine, other in zip(trained.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.cpu(), other.cpu(), rtol=1e-12, atol=1e-12)


def test_a_tied_weight_has_each_of_its_names() -> None:
    layers = nn.Sequential(*toy.tied_model())
    with toy.make(layers, roundel.GPipe(), toy.token_loss, microbatches=2) as trainer:
        trainer.step(*toy.tokens(1)[0])
        state = trainer.state_dict()
    again = nn.Sequential(*toy.tied_model())
    assert state.keys() == again.state_dict().keys()
    again.load_state_dict(state)
    for mine, other in zip(again.parameters(), layers.parameters(), strict=True):
        assert torch.equal(mine.cpu(), other.cpu())
