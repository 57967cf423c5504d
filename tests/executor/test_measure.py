"""The trace that is measured: kinds of layers, bytes, parts of backward, layers without memory."""

import gc
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roundel
from roundel.executor import measure_layer
from roundel.executor.decoder import decoder_layers
from roundel.executor.layers import Layers, Replica
from roundel.executor.left_out import FILLS
from roundel.executor.measure import measure_layers, with_real_bytes
from roundel.executor.optimizer_bytes import OptimizerBytes
from roundel.executor.presets import PRESETS
from roundel.executor.streams import CpuMark
from roundel.executor.token_loss import token_loss
from roundel.policies.work import Work
from roundel.traces.machine import ideal_machine

from ..costs import make_trace
from . import toy

CPU = torch.device(toy.DEVICE)
SHAPE = PRESETS["decoder-tiny"].shape


def measured(layers: list[nn.Module], loss: Any = token_loss, **options: Any) -> Any:
    tokens = torch.randint(200, (2, 16))
    told: list[int] = []
    trace, draws, *_ = measure_layers(
        Layers(layers),
        loss,
        tokens,
        tokens,
        CPU,
        told=lambda layer, count, name: told.append(layer),
        **options,
    )
    return trace, draws, told


def test_one_layer_of_each_kind_is_run() -> None:
    trace, _, told = measured(decoder_layers(SHAPE))
    assert told == [0, 1, 5]
    blocks = [layer.model_copy(update={"name": ""}) for layer in trace.layers[1:5]]
    assert len(set(blocks)) == 1
    assert [layer.name for layer in trace.layers[1:3]] == ["1.Block", "2.Block"]
    assert trace.microbatch_tokens == 32


def test_backward_is_run_by_the_thread_that_measures_as_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU autograd has threads of its own, which take time to wake and to wait for."""
    backward, others = torch.autograd.backward, list[bool]()

    def noted(*given: Any) -> None:
        others.append(torch.autograd.is_multithreading_enabled())
        backward(*given)

    monkeypatch.setattr(torch.autograd, "backward", noted)
    values = torch.ones(2, 4, device=CPU)
    measure_layers(Layers([nn.Linear(4, 4)]), nn.functional.mse_loss, values, values, CPU)
    assert set(others) == {False}


class Scaled(nn.Module):
    """Alike but for an attribute that no printed form shows."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.by = by

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value) * self.by


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (lambda layers: None, [0, 1, 3]),
        (lambda layers: setattr(layers[2], "by", 2.0), [0, 1, 2, 3]),
        (lambda layers: layers[2].inner.weight.requires_grad_(False), [0, 1, 2, 3]),
        (lambda layers: layers[2].eval(), [0, 1, 2, 3]),
        (lambda layers: setattr(layers[2].inner, "weight", layers[1].inner.weight), [0, 1, 2, 3]),
        (lambda layers: setattr(layers[2], "inner", nn.Linear(48, 48, bias=False)), [0, 1, 2, 3]),
    ],
)
def test_layers_that_differ_are_each_run(change: Any, ran: list[int]) -> None:
    embedding, *_, head = decoder_layers(SHAPE)
    layers = [embedding, Scaled(1.0), Scaled(1.0), head]
    change(layers)
    assert measured(layers)[2] == ran


def test_layers_without_memory_cost_the_same_bytes() -> None:
    real, _, _ = measured(decoder_layers(SHAPE))
    empty, _, _ = measured(decoder_layers(SHAPE, device="meta"))
    names = ("forward_ns", "backward_ns", "forward_only_ns", "recompute_last_ns")
    times = dict.fromkeys(names, 0)
    pairs = zip(real.layers, empty.layers, strict=True)
    assert all(a.model_copy(update=times) == b.model_copy(update=times) for a, b in pairs)


def test_backward_is_taken_apart() -> None:
    trace, _, _ = measured(decoder_layers(SHAPE), split=True, repeats=3)
    block = trace.layers[1]
    assert block.backward_input_ns > 0
    assert block.backward_weight_ns > 0
    # An embedding has nothing that can be put off.
    assert trace.layers[0].backward_weight_ns < trace.layers[0].backward_input_ns
    work = Work(trace, ideal_machine(2), 4)
    assert len(work.layer_ns("W")) == 6


def test_what_is_saved_is_counted_without_inputs_and_outputs() -> None:
    def tanh_of(value: Tensor) -> Tensor:
        return value.tanh()

    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return tanh_of(tanh_of(value)) * 2.0

    embedding, *_, head = decoder_layers(SHAPE)
    trace, _, _ = measured([embedding, Doubled(), head], repeats=2)
    # Of the two outputs of tanh both are saved; input and output of the layer are not.
    assert trace.layers[1].saved_bytes == 2 * trace.layers[1].output_bytes
    assert trace.layers[1].output_bytes == 2 * 16 * 48 * 4


class Odd(nn.Module):
    """Keeps what no printed form shows."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)
        for name, value in kept.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value)


SHARED = object()


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ({"rates": (0.1,)}, {"rates": (0.1,)}, True),
        ({"rates": (0.1,)}, {"rates": (0.2,)}, False),
        ({"sizes": {"a": [1]}}, {"sizes": {"a": [2]}}, False),
        ({"layer_idx": 0}, {"layer_idx": 1}, False),
        ({"work": torch.sin}, {"work": torch.sin}, True),
        ({"work": torch.sin}, {"work": torch.cos}, False),
        ({"config": SHARED}, {"config": SHARED}, True),
        ({"config": object()}, {"config": object()}, False),
        ({"table": torch.zeros(3)}, {"table": torch.zeros(3)}, True),
        ({"table": torch.zeros(3)}, {"table": torch.ones(3)}, False),
        ({"table": torch.zeros(3)}, {"table": torch.zeros(4)}, False),
    ],
)
def test_only_layers_that_are_known_to_be_alike_are_one_kind(
    first: dict[str, Any], second: dict[str, Any], alike: bool
) -> None:
    embedding, *_, head = decoder_layers(SHAPE)
    # The first layer gets no gradient for its input: let both stand behind another one.
    layers = [embedding, Scaled(1.0), Odd(**first), Odd(**second), head]
    assert measured(layers)[2] == ([0, 1, 2, 4] if alike else [0, 1, 2, 3, 4])


def test_a_hook_makes_a_layer_a_kind_of_its_own() -> None:
    embedding, *_, head = decoder_layers(SHAPE)
    layers = [embedding, Odd(), Odd(), Odd(), head]
    layers[2].register_forward_hook(lambda module, inputs, output: output)
    assert measured(layers)[2] == [0, 1, 2, 4]


def test_inputs_of_another_kind_and_without_gradient_count() -> None:
    linear = [nn.Linear(4, 4) for _ in range(4)]
    told: list[int] = []
    measure_layers(
        Layers(linear),
        nn.functional.mse_loss,
        torch.zeros(2, 4),
        torch.zeros(2, 4),
        CPU,
        told=lambda layer, count, name: told.append(layer),
    )
    assert told == [0, 1, 3]


def test_weights_are_not_saved_tensors() -> None:
    embedding, *_, head = decoder_layers(SHAPE)
    trace, _, _ = measured([embedding, Odd(), nn.Linear(48, 48), head])
    assert trace.layers[2].saved_bytes == 1


def test_all_that_is_timed_comes_behind_the_warm_up_and_that_behind_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that has rested, as it does in the trial, is faster."""
    order: list[str] = []
    for name in ("_try_leaving_out", "warm_up", "_forward_only_ns", "_recompute_last_ns", "_parts"):
        run = getattr(measure_layer.LayerRun, name)

        def noted(
            self: measure_layer.LayerRun, *given: Any, name: str = name, run: Any = run
        ) -> Any:
            order.append(name if name != "warm_up" else f"{name} {given[-1]}")
            return run(self, *given)

        monkeypatch.setattr(measure_layer.LayerRun, name, noted)

    class Runs(Odd):
        def forward(self, value: Tensor) -> Tensor:
            order.append("run")
            return self.inner(value)

    embedding, *_, head = decoder_layers(SHAPE)
    measured([embedding, Runs(), head], repeats=2, split=True, warm_s=0.25)
    mine = order[order.index("run") :]
    assert mine[:2] == ["run", "_try_leaving_out"]
    behind = mine.index("warm_up 0.25")
    assert set(mine[2:behind]) <= {"run"}
    # For gradients to be there, for bytes, before two repeats; on a GPU the warm-up's come first.
    timed = mine[behind + 1 : mine.index("_forward_only_ns")]
    assert set(timed) == {"run"}
    assert len(timed) >= 5
    assert "warm_up" not in "".join(mine[behind + 1 : mine.index("_parts")])


def test_the_most_memory_is_that_of_a_run_with_gradients_from_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else all of a layer's weights' gradients would count as its workspace."""
    order: list[bool | str] = []

    class Runs(Odd):
        def forward(self, value: Tensor) -> Tensor:
            order.append(all(each.grad is not None for each in self.parameters()))
            return self.inner(value)

    monkeypatch.setattr(measure_layer, "_most_allocated", lambda device: order.append("most") or 0)
    embedding, *_, head = decoder_layers(SHAPE)
    measured([embedding, Runs(), head], repeats=1)
    behind = [first for first, second in pairwise(order) if second == "most" != first]
    assert behind[:3] == [False, False, True]


def test_a_first_run_that_is_slow_does_not_count() -> None:
    class SlowAtFirst(Odd):
        def forward(self, value: Tensor) -> Tensor:
            if not hasattr(self, "warm"):
                self.warm = True
                time.sleep(0.2)
            return self.inner(value)

    embedding, *_, head = decoder_layers(SHAPE)
    trace, _, _ = measured([embedding, SlowAtFirst(), head], repeats=1)
    assert trace.layers[1].forward_ns < 10**8


def test_gradients_are_numbers_that_differ_and_a_loss_has_its_own() -> None:
    """A GPU is faster with numbers that are all alike than it will be in a step."""
    seen: list[Tensor] = []

    class Seeing(Odd):
        def forward(self, value: Tensor) -> Tensor:
            output = self.inner(value)
            if output.requires_grad:
                output.register_hook(seen.append)
            return output

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        total = token_loss(output, targets)
        if total.requires_grad:
            total.register_hook(seen.append)
        return total

    embedding, *_, head = decoder_layers(SHAPE)
    measured([embedding, Seeing(), head], loss, repeats=2)
    of_layer = [each for each in seen if each.ndim]
    # Three runs for bytes, one before two repeats; the trials of what a recompute leaves out.
    assert len(of_layer) == 6 + 1 + len(FILLS)
    assert all(len(each.unique()) > each.numel() // 2 for each in of_layer)
    assert all(torch.equal(each, of_layer[0]) for each in of_layer)
    assert [each.item() for each in seen if not each.ndim] == [1.0] * 6


@pytest.mark.usefixtures("marks_of_what_is_taken")
def test_a_forward_that_leaves_nothing_is_measured_by_itself() -> None:
    """A loss that makes its gradients on the way forward makes none where a recompute follows."""

    class SlowWithGraph(Odd):
        def forward(self, value: Tensor) -> Tensor:
            take(0.02 if torch.is_grad_enabled() else 0.001)
            return self.inner(value)

    embedding, *_, head = decoder_layers(SHAPE)
    trace, _, _ = measured([embedding, SlowWithGraph(), head], repeats=9)
    assert trace.layers[1].forward_ns == 20_000_000
    assert trace.layers[1].forward_only_ns == 1_000_000

    def slow_loss(output: Tensor, targets: Tensor) -> Tensor:
        take(0.02 if torch.is_grad_enabled() else 0.004)
        return token_loss(output, targets)

    trace, _, _ = measured([embedding, head], slow_loss, repeats=9)
    assert trace.layers[-1].forward_ns == 20_000_000
    assert trace.layers[-1].forward_only_ns == 4_000_000


class SlowWithGradients(torch.autograd.Function):
    """A loss from hidden values and a weight, that makes gradients of both together with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        take(0.02 if any(ctx.needs_input_grad) else 0.004)
        ctx.save_for_backward(torch.zeros_like(hidden), torch.zeros_like(weight))
        return hidden.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors


@pytest.mark.usefixtures("marks_of_what_is_taken")
def test_a_loss_with_weights_of_its_own_is_measured_without_their_gradients() -> None:
    """Weights that a layer hands to the loss ask for gradients, where a step's forward has none."""

    def loss(output: Any, targets: Tensor) -> Any:
        return SlowWithGradients.apply(output.hidden, output.weight)

    layers = decoder_layers(SHAPE, head_in_loss=True)
    trace, _, _ = measured([layers[0], layers[-1]], loss, repeats=9)
    assert trace.layers[-1].forward_ns == 20_000_000
    assert trace.layers[-1].forward_only_ns == 4_000_000


taken_ns = 0
"""What has been taken of a device, in tests whose marks tell that instead of the clock's time."""


@pytest.fixture
def marks_of_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may use the cores or the GPU."""

    def mark_now(device: torch.device) -> CpuMark:
        mark = CpuMark()
        mark.at_ns = taken_ns
        return mark

    monkeypatch.setattr(measure_layer, "mark_now", mark_now)


def take(seconds: float) -> None:
    global taken_ns
    taken_ns += round(seconds * 1e9)


def test_a_buffer_without_memory_is_made_of_zeros() -> None:
    with torch.device("meta"):
        module = Odd(table=torch.zeros(3))
    replica = Replica(module, torch.device("cpu"))
    assert replica.module.get_buffer("table").tolist() == [0, 0, 0]


def test_a_trace_of_times_alone_gets_the_bytes_of_the_layers() -> None:
    layers = Layers(decoder_layers(SHAPE, tied=True))
    trace = make_trace(len(layers))
    filled = with_real_bytes(trace, layers, torch.bfloat16, OptimizerBytes(12))
    real, _, _ = measured(layers.modules, compute=torch.bfloat16, optimizer=OptimizerBytes(12))
    for ours, theirs in zip(filled.layers, real.layers, strict=True):
        assert ours.param_bytes == theirs.param_bytes
        assert ours.grad_bytes == theirs.grad_bytes
        assert ours.optimizer_bytes == theirs.optimizer_bytes
        assert ours.params_to_update == theirs.params_to_update
        assert ours.tied_to == theirs.tied_to
    assert filled.layers[-1].tied_to == 0
    for layer, cost in enumerate(filled.layers):
        every, own = (
            sum(each.numel() for each in found(layer).values())
            for found in (layers.parameters_of, layers.owned_by)
        )
        assert (cost.grad_bytes, cost.optimizer_bytes) == (2 * every, 12 * own)
        assert cost.params_to_update == own
    assert with_real_bytes(real, layers, torch.bfloat16, OptimizerBytes(99)) == real


@pytest.mark.parametrize(
    "policy", [roundel.RoundRobin(**toy.CUTS), roundel.OneFOneB()], ids=lambda policy: policy.name
)
def test_a_trace_of_times_alone_trains_the_same(policy: roundel.Policy) -> None:
    batches = toy.vectors()
    expected = toy.plain(toy.blocks(), nn.functional.mse_loss, batches)
    got = toy.train(
        toy.blocks(), nn.functional.mse_loss, batches, policy, trace=make_trace(8), race=1
    )
    assert got[0] == pytest.approx(expected[0], abs=1e-12)


def test_a_trace_that_does_not_know_what_is_shared_trains_the_same() -> None:
    batches = toy.tokens()
    expected = toy.plain(toy.tied_model(), toy.token_loss, batches)
    trace = make_trace(8, param_bytes=8, grad_bytes=8, output_bytes=8)
    policy = roundel.OneFOneB()
    got = toy.train(toy.tied_model(), toy.token_loss, batches, policy, devices=2, trace=trace)
    assert got[0] == pytest.approx(expected[0], abs=1e-12)


def test_nothing_stays_in_memory_when_layers_have_been_measured() -> None:
    layers = Layers(decoder_layers(SHAPE))
    tokens = torch.randint(SHAPE.vocabulary, (2, 8))

    def tensors() -> int:
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    def measure() -> None:
        measure_layers(layers, token_loss, tokens, tokens, torch.device("cpu"), split=True)

    measure()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        measure()
        assert tensors() == before
    finally:
        gc.enable()
