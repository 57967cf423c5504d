"""The same run twice is the same to the last bit, however the lanes' timing falls out."""

import weakref

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor.gradients import GradientBook, Scratch
from roundel.executor.layers import Layers, WeightCopy
from roundel.executor.masters import Masters
from roundel.executor.weights import DeviceWeights

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


def test_the_norm_is_summed_in_the_order_of_the_parameters() -> None:
    layers = Layers([nn.Linear(1, 1, bias=False) for _ in range(3)])
    # In float64 the order decides about the last bits of these squares' sum.
    parts = [1e8, 1.0, 3e-9]
    norms = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        book = GradientBook(layers, [])
        for layer in order:
            book.add(layer, {"weight": torch.tensor([[parts[layer]]], dtype=torch.double)})
        norms.add(book.squared_norm())
    assert len(norms) == 1


def test_gradients_that_are_still_on_their_way_are_summed_when_they_are_asked_for() -> None:
    layers = Layers([nn.Linear(1, 1, bias=False)])
    book = GradientBook(layers, [(5, 0), (7, 0)])
    late = torch.zeros(1, 1)
    book.add(0, {"weight": late}, 7)
    book.add(0, {"weight": torch.ones(1, 1)}, 5)
    late.fill_(2.0)
    book.assign(0, None)
    (weight,) = layers.modules[0].parameters()
    assert weight.grad is not None
    assert weight.grad.item() == 3.0


def test_scratch_keeps_each_gradient_aligned() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3, dtype=torch.double))]
    grads = [torch.ones(1).bfloat16(), torch.ones(3)]
    for _ in range(2):
        pairs = Scratch().converted(list(zip(parameters, grads, strict=True)))
        for parameter, grad in pairs:
            assert grad.dtype == parameter.dtype
            assert grad.data_ptr() % 64 == pairs[0][1].data_ptr() % 64
            assert torch.equal(grad, torch.ones_like(parameter))


def test_weights_of_a_visit_that_has_ended_are_gone() -> None:
    weights = DeviceWeights(Layers([nn.Linear(2, 2, bias=False)]), torch.device("cpu"))
    copy = WeightCopy({"weight": nn.Parameter(torch.zeros(2, 2))})
    weights.keep(0, copy)
    weights.modules(0, 1)
    gone = weakref.ref(copy.parameters["weight"])
    weights.drop(0)
    del copy
    assert gone() is None


def test_a_rate_in_a_tensor_is_that_of_when_the_step_began() -> None:
    layers = toy.blocks(1)
    rate = torch.tensor(0.5)
    masters = Masters(Layers(layers), lambda parameters: torch.optim.SGD(parameters, lr=rate))
    settings = masters.settings()
    masters.optimizer.param_groups[0]["lr"].fill_(0.1)
    assert float(settings[0]["lr"]) == 0.5
