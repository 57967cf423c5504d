"""States that pass through a device lie at one place on the host for good, the weights too."""

import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import roundel
from roundel.executor.host_memory import host_bytes
from roundel.executor.layers import Layers, WeightCopy
from roundel.executor.masters import Masters
from roundel.executor.optimizer_bytes import OptimizerBytes
from roundel.executor.optimizer_state import _to_save
from roundel.executor.trainer import Trainer
from roundel.executor.values import tensors_of
from roundel.policies.plan import Optimizer
from roundel.policies.streamed import Streamed

from . import toy

mse = nn.functional.mse_loss


def test_host_memory_is_zeros_of_the_size_asked_for() -> None:
    flat = host_bytes(5000, pin=False)
    assert flat.shape == (5000,)
    assert flat.dtype == torch.uint8
    assert not flat.any()
    assert host_bytes(0, pin=False).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_host_memory_can_be_had_again_when_it_is_let_go() -> None:
    for _ in range(3):
        flat = host_bytes(3 * 2**20 + 1, pin=True)
        assert flat.is_pinned()
        assert torch.equal(flat.cuda(non_blocking=True).cpu(), flat)
        del flat


def _places(trainer: Trainer) -> dict[str, int]:
    """Where every weight and state is, by name."""
    places = {}
    for name, each in trainer.layers.named_parameters():
        places[name] = each.data_ptr()
        for key, value in trainer.optimizer.state[each].items():
            if value.ndim:
                places[f"{name} {key}"] = _first_part(value).data_ptr()
    return places


def _first_part(value: Any) -> torch.Tensor:
    return value.codes if hasattr(value, "codes") else value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("optimizer", ["sync", "stale"])
def test_nothing_moves_on_the_host_from_step_to_step(optimizer: str, dtype: torch.dtype) -> None:
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device", optimizer=optimizer)  # type: ignore[arg-type]
    compute = None if dtype == torch.float64 else torch.bfloat16
    with Trainer(
        [each.to(dtype) for each in toy.blocks()],
        lambda output, target: mse(output, target.to(output.dtype)),
        policy=policy,
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
        compute_dtype=compute,
    ) as trainer:
        batches = [(x.to(compute or dtype), y) for x, y in toy.vectors(3)]
        trainer.step(*batches[0])
        trainer.flush()
        before = _places(trainer)
        for batch in batches[1:]:
            trainer.step(*batch)
        trainer.flush()
        assert _places(trainer) == before
        assert trainer._ready is not None
        copies = trainer._ready.machinery.host_copies
        within = [
            any(flat.data_ptr() <= place < flat.data_ptr() + len(flat) for flat in each.flats)
            for name, place in before.items()
            if " " not in name
            for each in [copies[int(name.partition(".")[0])]]
        ]
        # One copy of the weights is all that the host has, where no other is needed.
        assert set(within) == {optimizer == "sync" and compute is None}


@pytest.mark.parametrize("optimizer", ["sync", "stale"])
@pytest.mark.parametrize("kind", [roundel.RoundRobin, roundel.LayerToLayer])
def test_an_update_among_the_ops_is_the_same(
    kind: type[Streamed], optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that need more room than their state has are on the compute lane."""
    monkeypatch.setattr(
        "roundel.executor.trainer.optimizer_bytes", lambda *rest: OptimizerBytes(16.0, room=17.0)
    )
    policy = kind(**toy.CUTS, optimizer_on="device", optimizer=optimizer)
    batches = toy.vectors()
    expected = (toy.plain if optimizer == "sync" else toy.one_step_stale)(
        toy.blocks(), mse, batches
    )
    for race in range(3):
        losses, weights = toy.train(toy.blocks(), mse, batches, policy, race=race)
        assert losses == pytest.approx(expected[0], rel=1e-12)
        for each, other in zip(weights, expected[1], strict=True):
            torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-12)


def test_states_of_four_bits_pass_through_a_device() -> None:
    torchao = toy.torchao_optimizers()
    torch.manual_seed(2)
    start = [nn.Linear(64, 64).to(torch.bfloat16) for _ in range(2)]
    optimizer = partial(torchao.AdamW4bit, lr=1e-2)
    numbers = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 8, 64, generator=numbers).to(torch.bfloat16)

    def layers() -> list[nn.Module]:
        made: list[nn.Module] = [nn.Linear(64, 64).to(torch.bfloat16) for _ in range(2)]
        for each, other in zip(made, start, strict=True):
            each.load_state_dict(other.state_dict())
        return made

    policy = roundel.RoundRobin(partition=(1,), backward_partition=(1, 1), optimizer_on="device")
    options = {"optimizer": optimizer, "devices": 2, "microbatches": 1}
    expected = toy.plain(layers(), mse, [(x, y)] * 3, optimizer=optimizer)
    got = toy.train(layers(), mse, [(x, y)] * 3, policy, **options)
    assert got[0] == expected[0]
    for each, other in zip(got[1], expected[1], strict=True):
        assert torch.equal(each, other)


def test_states_of_four_bits_are_saved_and_go_on(tmp_path: Path) -> None:
    torchao = toy.torchao_optimizers()
    numbers = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 8, 64, generator=numbers).to(torch.bfloat16)

    def made() -> Trainer:
        torch.manual_seed(2)
        return Trainer(
            [nn.Linear(64, 64).to(torch.bfloat16) for _ in range(2)],
            mse,
            policy=roundel.RoundRobin((1,), (1, 1), optimizer_on="device"),
            optimizer=partial(torchao.AdamW4bit, lr=1e-2),
            devices=toy.devices(1),
            microbatches=1,
        )

    with made() as trainer:
        for _ in range(2):
            trainer.step(x, y)
        trainer.save(tmp_path)
        expected = [trainer.step(x, y).loss for _ in range(2)]
    with made() as trainer:
        assert trainer.load(tmp_path) == 2
        assert [trainer.step(x, y).loss for _ in range(2)] == expected


def test_states_that_lie_together_are_saved_without_a_copy() -> None:
    """A layer's states have memory of their own, which a checkpoint takes as it is."""
    layers: list[nn.Module] = [nn.Linear(64, 64) for _ in range(2)]
    policy = roundel.RoundRobin((1,), (1, 1), optimizer_on="device")
    options = {"policy": policy, "devices": toy.devices(1), "microbatches": 1}
    with Trainer(layers, mse, optimizer=toy.ADAMW, **options) as trainer:  # type: ignore[arg-type]
        for _ in range(2):
            trainer.step(torch.ones(2, 64), torch.zeros(2, 64))
        trainer.flush()
        state = {str(id(each)): kept for each, kept in trainer.optimizer.state.items()}
        before = [each for each in tensors_of(state) if each.ndim]
        after = [each for each in tensors_of(_to_save(state)) if each.ndim]
    assert len(before) == 8
    assert [each.data_ptr() for each in before] == [each.data_ptr() for each in after]
    one = {"moment": before[0]}
    assert _to_save(one)["moment"].untyped_storage().nbytes() == before[0].nbytes


def test_what_goes_up_and_what_does_not() -> None:
    """Masters that lie in what uploads read stay; so does the count of steps."""
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    options = {"policy": policy, "devices": toy.devices(1), "microbatches": 1}
    with Trainer(toy.blocks(), mse, optimizer=toy.ADAMW, **options) as trainer:  # type: ignore[arg-type]
        trainer.step(*toy.vectors(1)[0])
        assert trainer._ready is not None
        machinery = trainer._ready.machinery
        weight = next(trainer.layers.modules[2].parameters())
        state = trainer.optimizer.state[weight]
        at_home = {name: each.data_ptr() for name, each in state.items()}
        place = weight.data_ptr()
        machinery.transit.up(2, torch.device(toy.DEVICE), machinery.streams[0])
        assert weight.data_ptr() == place
        up = {name for name, each in state.items() if each.data_ptr() != at_home[name]}
        assert up == {"exp_avg", "exp_avg_sq"}
        copies = machinery.host_copies[2]
        flat = copies.flat(0).clone().to(toy.DEVICE)
        machinery.transit.take(2, WeightCopy(copies.layout.parameters(flat), flat))
        assert weight.data_ptr() != place
        machinery.transit.weights_down(2, 0)
        assert weight.data_ptr() == place
        machinery.transit.states_down(2)
        assert {name: each.data_ptr() for name, each in state.items()} == at_home
        assert weight.data_ptr() == place


class Replacing(torch.optim.Optimizer):
    """Puts a new tensor in the place of its state, as functional optimizers do."""

    gone: ClassVar[list[bool]] = []

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is None:
                    continue
                state = self.state[each]
                before = state.get("sum", torch.zeros_like(each))
                state["sum"] = before + each.grad
                came_up = weakref.ref(before) if "again" in state else lambda: True
                state["again"] = True
                del before
                if threading.current_thread().name.startswith("roundel"):
                    self.gone.append(came_up() is None)
                each -= group["lr"] * state["sum"]


def test_what_came_up_stays_until_all_is_down() -> None:
    """Kernels that read it may not have begun when an optimizer lets go of it."""
    Replacing.gone.clear()
    policy = roundel.RoundRobin(**toy.CUTS, optimizer_on="device")
    options = {"policy": policy, "devices": 1, "microbatches": 1, "optimizer": Replacing}
    batches = toy.vectors(3)
    losses, _ = toy.train(toy.blocks(), mse, batches, **options)
    expected, _ = toy.plain(toy.blocks(), mse, batches, optimizer=Replacing)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert len(Replacing.gone) > 0
    assert not any(Replacing.gone)


def test_states_of_a_parameter_without_dimensions_move_and_counts_stay() -> None:
    gate = nn.Module()
    gate.scale = nn.Parameter(torch.ones((), dtype=torch.double))
    masters = Masters(Layers([gate]), toy.ADAMW)
    gate.scale.grad = torch.ones_like(gate.scale)
    masters.step(0, masters.settings())
    assert set(masters.large_states(gate.scale)) == {"exp_avg", "exp_avg_sq"}


def test_states_pass_through_where_layers_share_what_is_frozen() -> None:
    """As with adapters on a model whose head is its embedding."""
    losses = []
    for place in ("host", "device"):
        layers = toy.tied_model()
        layers[0].table.weight.requires_grad_(False)
        policy = roundel.RoundRobin(optimizer_on=place)
        losses.append(toy.train(layers, toy.token_loss, toy.tokens(), policy)[0])
    layers = toy.tied_model()
    layers[0].table.weight.requires_grad_(False)
    expected = toy.plain(layers, toy.token_loss, toy.tokens())[0]
    assert losses == [pytest.approx(expected, abs=1e-12)] * 2
