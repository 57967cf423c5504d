"""A trace of the user's own layers, measured briefly, so that a policy can cut."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from ..traces.trace import LayerCost, Trace
from .compute import LossFunction
from .kinds import kind_of
from .layers import Layers, Layout
from .left_out import LeftOut
from .measure_layer import LayerRun, bytes_of_weights
from .optimizer_bytes import OptimizerBytes
from .places import device_name
from .values import Value, count_tokens, map_tensors

ADAM = OptimizerBytes(8)
"""Two moments in float32."""


class Measured(NamedTuple):
    """What layers cost, which of them draw random numbers, and what a recompute leaves out.

    `passes_gradient`: for each layer whether its output takes gradients, as it does not behind a
    detach, for example.
    """

    trace: Trace
    draws: set[int]
    left_out: dict[int, LeftOut]
    passes_gradient: list[bool]


class _Kind(NamedTuple):
    cost: LayerCost
    output: Value
    draws: bool
    left_out: LeftOut
    passes_gradient: bool


Told = Callable[[int, int, str], None]
"""Told of each layer that is run: its number, how many there are, and its name."""


def measure_layers(
    layers: Layers,
    loss_fn: LossFunction,
    inputs: Value,
    targets: Value,
    device: torch.device,
    *,
    compute: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: OptimizerBytes = ADAM,
    repeats: int = 1,
    split: bool = False,
    warm_s: float = 0.0,
    told: Told = lambda layer, count, name: None,
) -> Measured:
    """Run a layer of each kind on one microbatch.

    Layers of one kind, alike in all but their weights' values, cost the same, and the first of them
    is run: so may a model be measured that is larger than the device, or that has no memory at all
    (on the meta device). Times are the median of `repeats` runs behind two others where there
    are several; `split` also takes backward apart; a GPU works for `warm_s` before. Every tensor
    that is kept counts at least a byte. `optimizer`: what it keeps and needs of each trained
    parameter.
    """
    value = map_tensors(lambda tensor: tensor.to(device), inputs)
    goal = map_tensors(lambda tensor: tensor.to(device), targets)
    passes: list[bool] = []
    costs: list[LayerCost] = []
    draws: set[int] = set()
    left_out: dict[int, LeftOut] = {}
    spread = 0.0
    known: dict[Hashable, _Kind] = {}
    for layer, module in enumerate(layers.modules):
        name = f"{layer}.{type(module).__name__}"
        needs = layer > 0 and passes[-1]
        kind = kind_of(layers, layer, needs, value)
        if kind not in known:
            told(layer, len(layers), name)
            run = LayerRun(module, layers, layer, device, compute, autocast)
            if layer == len(layers) - 1:
                run.loss = lambda output: loss_fn(output, goal)
            try:
                measured = run.measure(value, needs, optimizer, repeats, split, warm_s)
                known[kind] = _Kind(*measured, run.left_out, run.passes_gradient)
            except Exception as error:
                error.add_note(f"in layer {layer} ({type(module).__name__}), while it was measured")
                raise
            finally:
                run.close()
            spread = max(spread, run.spread)
        found = known[kind]
        value, left_out[layer] = found.output, found.left_out
        costs.append(found.cost.model_copy(update={"name": name}))
        passes.append(found.passes_gradient)
        if found.draws:
            draws.add(layer)
    trace = Trace(
        name="layers",
        device=device_name(device),
        provenance=f"measured by Roundel, a layer of each kind, median of {repeats}, middle half "
        f"within {spread:.1%}; torch {torch.__version__}",
        microbatch_tokens=count_tokens(inputs),
        layers=tuple(costs),
    )
    return Measured(trace, draws, left_out, passes)


def with_real_bytes(
    trace: Trace, layers: Layers, compute: torch.dtype | None, optimizer: OptimizerBytes
) -> Trace:
    """A trace of these layers that may know their times only, with the bytes of their weights and
    what is shared.

    What the trace says stays; what is kept counts at least a byte, for it takes part in a step.
    """
    costs = []
    for layer, cost in enumerate(trace.layers):
        layout = Layout.of(layers.parameters_of(layer), compute)
        real = bytes_of_weights(layout, layers.owned_by(layer), optimizer)
        params = real.pop("trainable_params")
        real |= {"output_bytes": 1, "saved_bytes": 1}
        missing = {name: value for name, value in real.items() if not getattr(cost, name)}
        if "grad_bytes" in missing and cost.trainable_params in (None, 0):
            missing["trainable_params"] = params
        costs.append(cost.model_copy(update=missing | {"tied_to": layers.trained_with(layer)}))
    return trace.model_copy(update={"layers": tuple(costs)})
