"""What optimizers keep of a parameter."""

from functools import partial

import pytest
import torch

from roundel.executor.optimizer_bytes import OptimizerBytes, optimizer_bytes

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
    assert optimizer_bytes(optimizer, weights, compute) == OptimizerBytes(expected)


def test_states_of_few_bits() -> None:
    torchao = toy.torchao_optimizers()
    # Two moments of a byte each and a float32 scale every 256, or of half a byte and every 128;
    # and what is kept once, the table of values, as so few parameters as here see it.
    assert 2 + 2 * 4 / 256 <= optimizer_bytes(torchao.AdamW8bit, torch.bfloat16, None).state <= 2.25
    assert (
        1 + 2 * 4 / 128 <= optimizer_bytes(torchao.AdamW4bit, torch.bfloat16, None).state <= 1.125
    )


def test_states_of_tables_have_more_bits() -> None:
    toy.torchao_optimizers()
    from roundel.executor.low_bit import AdamW4bit

    optimizer = partial(AdamW4bit, table_rows=1000)
    found = optimizer_bytes(optimizer, torch.bfloat16, None, rows=[64, 1000])
    assert found.state <= 1.125
    assert list(found.by_rows) == [1000]
    assert 2 <= found.by_rows[1000] <= 2.25
    assert optimizer_bytes(optimizer, torch.bfloat16, None, rows=[64]).by_rows == {}


def test_what_a_layer_costs() -> None:
    weights = [torch.empty(100), torch.empty(3, 100)]
    one_by_one = OptimizerBytes(1.25, room=16, at_once=False)
    assert one_by_one.of_layer(weights) == {
        "optimizer_bytes": 500,
        "update_workspace_bytes": 4800,
    }
    assert one_by_one._replace(most=200).of_layer(weights)["update_workspace_bytes"] == 3200
    assert one_by_one._replace(by_rows={3: 2.25}).of_layer(weights)["optimizer_bytes"] == 800
    together = OptimizerBytes(12, room=2, converted=4)
    assert together.of_layer(weights)["update_workspace_bytes"] == 2400
    assert together.of_layer([]) == {"optimizer_bytes": 0, "update_workspace_bytes": 0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_room_for_updates_on_a_gpu() -> None:
    """Without fused kernels torch makes copies of all weights at once."""
    for fused, least, most in ((True, 0.0, 0.5), (False, 3.5, 20.0)):
        optimizer = partial(torch.optim.AdamW, fused=fused)
        found = optimizer_bytes(optimizer, torch.float32, torch.bfloat16, "cuda:0")
        assert found.state == 12
        assert least <= found.room <= most
        assert found.converted == 4
