"""Large weights are updated in slices of rows, and train as if they were not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import roundel
from roundel.executor import slices
from roundel.executor.trainer import Trainer

from . import toy

mse = nn.functional.mse_loss
ON_DEVICE = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MOST", 2 * toy.WIDTH)


@pytest.mark.parametrize(
    "policy",
    [
        roundel.GPipe(),
        roundel.OneFOneB(optimizer_on="host"),
        roundel.RoundRobin(**toy.CUTS),
        ON_DEVICE,
    ],
    ids=repr,
)
def test_training_is_the_same(policy: roundel.Policy) -> None:
    batches = toy.vectors()
    expected = toy.plain(toy.blocks(), mse, batches)
    losses, weights = toy.train(toy.blocks(), mse, batches, policy, race=1)
    assert losses == pytest.approx(expected[0], abs=1e-12)
    for got, each in zip(weights, expected[1], strict=True):
        torch.testing.assert_close(got, each, rtol=0, atol=1e-9)


def trainer(optimizer: object = toy.ADAMW, **options: object) -> Trainer:
    arguments = {"policy": ON_DEVICE, "devices": toy.devices(2), "microbatches": 2, **options}
    return Trainer(toy.blocks(), mse, optimizer=optimizer, **arguments)  # type: ignore[arg-type]


def test_an_optimizer_has_slices_of_what_is_large_where_it_updates_by_element() -> None:
    sizes = [each.shape for each in trainer().optimizer.param_groups[0]["params"]]
    assert set(sizes) == {(2, toy.WIDTH), (toy.WIDTH,)}
    whole = trainer(partial(torch.optim.Adafactor, lr=1e-3))
    assert {each.ndim for each in whole.optimizer.param_groups[0]["params"]} == {1, 2}
    assert (2, toy.WIDTH) not in [each.shape for each in whole.optimizer.param_groups[0]["params"]]


def test_a_checkpoint_has_them_and_training_goes_on_bitwise(tmp_path: Path) -> None:
    batches = toy.vectors(4)
    with trainer() as through:
        expected = [through.step(*batch).loss for batch in batches]
    with trainer() as first:
        for batch in batches[:2]:
            first.step(*batch)
        first.save(tmp_path)
    with trainer(policy=roundel.GPipe()) as second:
        assert second.load(tmp_path) == 2
        names = dict(second.masters.slices.named())
        assert "0.0.weight[2:]" in names
        assert names["0.0.weight[2:]"] in second.optimizer.state
        losses = [second.step(*batch).loss for batch in batches[2:]]
    assert losses == pytest.approx(expected[2:], abs=1e-12)
    with trainer() as third:
        third.load(tmp_path)
        losses = [third.step(*batch).loss for batch in batches[2:]]
    if toy.DEVICE == "cpu":
        assert losses == expected[2:]


def test_slices_of_a_table_have_states_of_eight_bits() -> None:
    toy.torchao_optimizers()
    from roundel.executor.low_bit import AdamW4bit

    layers = [nn.Embedding(1024, 8), nn.Linear(8, 512), nn.Linear(512, 8)]
    optimizer = AdamW4bit(nn.Sequential(*layers).parameters(), table_rows=1024)
    slices.MOST = 4096
    made = slices.Slices(roundel.Layers(layers), optimizer)
    table, *others = made.of(layers[0].weight), made.of(layers[1].weight)
    assert [each.shape for each in table] == [(512, 8)] * 2
    found = [optimizer._new_buffer(each, True).codes for part in (table, *others) for each in part]
    assert [each.numel() for each in found] == [4096, 4096, 2048]
