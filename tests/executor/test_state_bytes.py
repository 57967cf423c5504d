"""What optimizers keep of a parameter."""

from functools import partial

import pytest
import torch

from roundel.executor.state_bytes import state_bytes

from . import toy


@pytest.mark.parametrize(
    ("optimizer", "weights", "compute", "expected"),
    [
        (torch.optim.AdamW, torch.float32, None, 8),
        (torch.optim.AdamW, torch.float32, torch.bfloat16, 12),
        (torch.optim.AdamW, torch.bfloat16, None, 4),
        (torch.optim.AdamW, torch.bfloat16, torch.bfloat16, 4),
        (torch.optim.AdamW, torch.float64, None, 16),
        (partial(torch.optim.AdamW, amsgrad=True), torch.float32, None, 12),
        (torch.optim.SGD, torch.float32, None, 0),
        (partial(torch.optim.SGD, momentum=0.9), torch.float32, torch.bfloat16, 8),
    ],
)
def test_bytes_a_parameter(optimizer, weights, compute, expected) -> None:  # type: ignore[no-untyped-def]
    assert state_bytes(optimizer, weights, compute) == expected


def test_states_of_few_bits() -> None:
    torchao = toy.torchao_optimizers()
    # Two moments of a byte each and a float32 scale every 256, or of half a byte and every 128;
    # and what is kept once, the table of values, as so few parameters as here see it.
    assert 2 + 2 * 4 / 256 <= state_bytes(torchao.AdamW8bit, torch.bfloat16, None) <= 2.25
    assert 1 + 2 * 4 / 128 <= state_bytes(torchao.AdamW4bit, torch.bfloat16, None) <= 1.125
