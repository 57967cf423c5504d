"""The trace that is measured: kinds of layers, bytes, parts of backward, layers without memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roundel.executor.decoder import decoder_layers
from roundel.executor.layers import Layers
from roundel.executor.measure import measure_layers
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.policies.work import Work
from roundel.traces.machine import ideal_machine

from . import toy

CPU = torch.device(toy.DEVICE)
SHAPE = PRESETS["decoder-tiny"].shape


def measured(layers: list[nn.Module], loss: Any = token_loss, **options: Any) -> Any:
    tokens = torch.randint(200, (2, 16))
    told: list[int] = []
    trace, draws = measure_layers(
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
    times = dict.fromkeys(("forward_ns", "backward_ns"), 0)
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
