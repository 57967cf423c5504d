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


@pytest.mark.parametrize("policy", [roundel.GPipe(), roundel.RoundRobin(**toy.CUTS), ON_DEVICE])
def test_slices_lie_where_their_weights_do(policy: roundel.Policy) -> None:
    """Else they would keep memory that nothing else uses any more."""

    def apart(each: Trainer) -> list[str]:
        found = []
        for name, weight in each.layers.named_parameters():
            ends = {weight.data_ptr(), weight.data_ptr() + weight.nbytes}
            parts = each.masters.slices.of(weight)
            last = parts[-1]
            if {parts[0].data_ptr(), last.data_ptr() + last.nbytes} != ends:
                found.append(name)
        return found

    with trainer(policy=policy) as running:
        for batch in toy.vectors(2):
            running.step(*batch)
            running.flush()
            assert not apart(running)
    assert not apart(running)


def test_rows_that_do_not_divide() -> None:
    layer = nn.Linear(toy.WIDTH, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    made = slices.Slices(roundel.Layers([layer]), optimizer)
    assert [len(each) for each in made.of(layer.weight)] == [2, 2, 2, 1]
    layer.weight.grad = torch.arange(42.0).view(7, 6)
    expected = layer.weight.detach() - layer.weight.grad
    made.bind(0)
    optimizer.step()
    assert torch.equal(layer.weight, expected)


def test_a_checkpoint_of_other_slices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer() as sliced:
        sliced.step(*toy.vectors(1)[0])
        sliced.save(tmp_path / "sliced")
    frozen = toy.blocks()
    frozen[0][0].weight.requires_grad_(False)
    options = {"policy": ON_DEVICE, "devices": toy.devices(2), "microbatches": 2}
    other = Trainer(frozen, mse, optimizer=toy.ADAMW, **options)  # type: ignore[arg-type]
    with pytest.raises(roundel.InputError, match=r"'0.0.weight' was trained there, it is frozen"):
        other.load(tmp_path / "sliced")
    monkeypatch.setattr(slices, "MOST", 1000)
    with pytest.raises(roundel.InputError, match=r"updated in slices there, whole here; begin"):
        trainer().load(tmp_path / "sliced")
    with trainer() as whole:
        whole.step(*toy.vectors(1)[0])
        whole.save(tmp_path / "whole")
    monkeypatch.setattr(slices, "MOST", 12)
    with pytest.raises(roundel.InputError, match=r"updated whole there, in slices here"):
        trainer().load(tmp_path / "whole")


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
