"""Placement: weights before the first step, on devices for good or on the host, to go up."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..policies.plan import Plan
from .deferred import defer_linears
from .host_copies import HostCopies
from .layers import Layers
from .places import gpus_of
from .weights import DeviceWeights, resident_copy


class Placed(NamedTuple):
    """The weights on each device, and by layer what uploads read."""

    weights: list[DeviceWeights]
    host_copies: dict[int, HostCopies]


def place_weights(
    plan: Plan,
    layers: Layers,
    devices: Sequence[torch.device],
    compute: torch.dtype | None,
) -> Placed:
    """Put a model's weights where a plan has them, in the dtype `compute`."""
    splits = any(op.kind == "I" for ops in plan.devices for op in ops)
    prepare = defer_linears if splits else None
    weights = [DeviceWeights(layers, device, prepare) for device in devices]
    if plan.weights == "resident":
        _place_residents(plan, layers, weights, compute)
    copies, pin = 2 if plan.optimizer == "stale" else 1, bool(gpus_of(devices))
    host_copies = {
        layer: HostCopies(layers.parameters_of(layer), layers.owned_by(layer), compute, copies, pin)
        for layer in _uploaded(plan, layers)
    }
    return Placed(weights, host_copies)


def _uploaded(plan: Plan, layers: Layers) -> Sequence[int]:
    """The layers that go up again and again: streamed ones, and those that the host updates."""
    every = range(len(layers))
    if plan.weights == "streamed":
        return every
    parameters = layers.parameters_of
    trained = [n for n in every if any(p.requires_grad for p in parameters(n).values())]
    return trained if plan.optimizer_on == "host" else []


def _place_residents(
    plan: Plan, layers: Layers, weights: list[DeviceWeights], compute: torch.dtype | None
) -> None:
    own = plan.optimizer_on == "device"
    homes = {
        layer: number
        for number, ops in enumerate(plan.devices)
        for op in ops
        for layer in range(op.first, op.stop)
    }
    for layer, number in sorted(homes.items()):
        there = weights[number]
        there.keep(layer, resident_copy(layers, layer, there.device, compute, own))
