"""The loss of a language model in parts is the loss as a whole."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from roundel.executor import token_loss as module
from roundel.executor.token_loss import IGNORED, token_loss

from . import toy


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("chunk", [1, 14, 40, 1000])
def test_loss_and_gradient_are_those_of_plain_pytorch(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(2)
    logits = 30 * torch.randn(3, 9, 7, dtype=torch.double, device=toy.DEVICE)
    logits.requires_grad_()
    targets = torch.randint(7, (3, 9), device=toy.DEVICE)
    targets[1, :4] = IGNORED
    losses = [3 * loss(logits, targets) for loss in (token_loss, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


@pytest.mark.parametrize("chunk", [9, 1000])
def test_narrow_logits_are_as_in_float32(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(2)
    logits = torch.randn(2, 5, 9).bfloat16().to(toy.DEVICE).requires_grad_()
    targets = torch.randint(9, (2, 5), device=toy.DEVICE)
    loss, expected = token_loss(logits, targets), plain(logits.float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (loss, expected)]
    assert gradients[0].dtype == torch.bfloat16
    # Both are float32 rounded once: they differ where float32's last bit decides the rounding.
    torch.testing.assert_close(*gradients, rtol=2**-8, atol=0)


def test_a_loss_of_no_targets_is_nothing() -> None:
    logits = torch.randn(2, 5, 9, requires_grad=True)
    loss = token_loss(logits, torch.full((2, 5), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
