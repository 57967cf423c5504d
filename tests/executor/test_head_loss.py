"""The loss that makes its logits in parts is the loss of whole logits, and so are its gradients."""

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor import head_loss as module
from roundel.executor.decoder import decoder_layers
from roundel.executor.head_loss import Projected
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import IGNORED, token_loss

from . import toy


def case(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    hidden = torch.randn(3, 9, 5, device=toy.DEVICE).to(dtype).requires_grad_()
    weight = (3 * torch.randn(7, 5, device=toy.DEVICE)).to(dtype).requires_grad_()
    targets = torch.randint(7, (3, 9), device=toy.DEVICE)
    targets[1, :4] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 14, 40, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, weight, targets = case()
    output = Projected(hidden, weight)
    losses = [3 * token_loss(each, targets) for each in (output, output.logits())]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-13)
    for leaf in (hidden, weight):
        got, expected = (torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in losses)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_bf16_is_as_near_to_float64_as_whole_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 28)
    hidden, weight, targets = case(torch.bfloat16)
    wide = Projected(*(each.detach().double().requires_grad_() for each in (hidden, weight)))
    exact = torch.autograd.grad(token_loss(wide, targets), wide.weight)[0]

    def error(output: Tensor | Projected) -> float:
        (grad,) = torch.autograd.grad(token_loss(output, targets), weight)
        assert grad.dtype == torch.bfloat16
        return float((grad.double() - exact).norm() / exact.norm())

    assert error(Projected(hidden, weight)) < 2 * error(Projected(hidden, weight).logits())


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = case()
    with torch.no_grad():
        loss = token_loss(Projected(hidden, weight), targets)
    assert not loss.requires_grad
    weight.requires_grad_(False)
    token_loss(Projected(hidden, weight), targets).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_under_autocast_the_product_is_narrow() -> None:
    hidden, weight, targets = case(torch.float32)
    with torch.autocast(torch.device(toy.DEVICE).type, torch.bfloat16):
        loss = token_loss(Projected(hidden, weight), targets)
        expected = token_loss(Projected(hidden, weight).logits(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("policy", toy.every_policy(), ids=lambda policy: policy.name)
def test_every_policy_trains_with_the_head_in_the_loss_and_parts_in_chunks(
    policy: roundel.Policy, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 3 * 13)
    shape = PRESETS["decoder-tiny"].shape
    shape = type(shape)(**{**vars(shape), "layers": 6, "vocabulary": toy.VOCABULARY})

    def layers(in_loss: bool) -> list[nn.Module]:
        torch.manual_seed(4)
        parts = {"head_in_loss": in_loss, "ffn_chunk": 3 if in_loss else None}
        return decoder_layers(shape, tied, dtype=torch.double, **parts)

    batches = toy.tokens()
    expected = toy.plain(layers(in_loss=False), token_loss, batches)
    losses, weights = toy.train(layers(in_loss=True), token_loss, batches, policy, race=2)
    assert losses == pytest.approx(expected[0], abs=1e-9)
    for got, each in zip(weights, expected[1], strict=True):
        torch.testing.assert_close(got, each, rtol=0, atol=1e-7)
