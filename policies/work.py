"""Work: what a policy plans for."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..traces.errors import InputError
from ..traces.machine import Machine
from ..traces.trace import LayerCost, Trace
from .op import Op

MOST_MICROBATCHES = 10**6


def whole_number(name: str, value: object, most: int = 10**6) -> None:
    """Raises InputError unless `value` is a whole number from 1 to `most`."""
    if type(value) is not int:
        raise InputError(f"{name}: must be a whole number, got {value!r}")
    if value < 1:
        raise InputError(f"{name}: must be at least 1, got {value}")
    if value > most:
        raise InputError(f"{name}: must be at most {most:,}, got {value}")


@dataclass(frozen=True)
class Work:
    """A trace to run on a machine in `microbatches` microbatches a step."""

    trace: Trace
    machine: Machine
    microbatches: int

    def __post_init__(self) -> None:
        whole_number("microbatches", self.microbatches, MOST_MICROBATCHES)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.machine.devices)

    @property
    def layers(self) -> int:
        """Number of layers, the loss head included."""
        return len(self.trace.layers)

    def layer_ns(
        self, kind: str, weight_share: float | None = None, forgets: bool = False
    ) -> list[int]:
        """Nanoseconds of each layer in an op of `kind`, for one microbatch.

        `weight_share` is the part of backward that `W` takes where the trace has no split;
        `forgets`: `F` leaves nothing for backward, as `R` will.
        """
        if forgets and kind == "F":
            return [_or_forward(each, each.forward_only_ns) for each in self.trace.layers]
        return [_layer_ns(layer, kind, weight_share) for layer in self.trace.layers]

    def together_ns(self, kinds: str, weight_share: float | None = None) -> list[int]:
        """Nanoseconds of each layer in ops of all these kinds together, for one microbatch.

        "F" alone, or with an "R", is a forward that leaves nothing for backward.
        """
        forgets = "R" in kinds or kinds == "F"
        times = [self.layer_ns(kind, weight_share, forgets) for kind in kinds]
        return [sum(layer) for layer in zip(*times, strict=True)]

    @cached_property
    def spared_ns(self) -> list[int]:
        """Nanoseconds that an `R` takes less whose last layer is this: nobody reads its output."""
        layers = self.trace.layers[:-1]  # The loss reads the last one's.
        times = ((each.recompute_last_ns, _layer_ns(each, "R", None)) for each in layers)
        return [0 if last is None else max(0, whole - last) for last, whole in times] + [0]

    def op_ns(self, op: Op, weight_share: float | None = None) -> int:
        """Nanoseconds of `op`; of a forward, one that leaves what backward needs."""
        spared = self.spared_ns[op.stop - 1] if op.kind == "R" else 0
        return sum(self.layer_ns(op.kind, weight_share)[op.first : op.stop]) - spared

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """The layer that owns each layer's shared parameters: itself, or the one it is tied to."""
        layers = enumerate(self.trace.layers)
        return np.array([n if each.tied_to is None else each.tied_to for n, each in layers])

    def layer_bytes(self, field: str) -> NDArray[np.int64]:
        """One bytes field of every layer, as an array of shape (layers,)."""
        return self._bytes[field]

    @cached_property
    def _bytes(self) -> dict[str, NDArray[np.int64]]:
        names = [name for name in LayerCost.model_fields if name.endswith("_bytes")]
        return {
            name: np.array([getattr(layer, name) for layer in self.trace.layers], dtype=np.int64)
            for name in names
        }


def _or_forward(layer: LayerCost, time_ns: int | None) -> int:
    return layer.forward_ns if time_ns is None else time_ns


def _layer_ns(layer: LayerCost, kind: str, weight_share: float | None) -> int:
    if kind == "F":
        return layer.forward_ns
    if kind == "R":
        return _or_forward(layer, layer.recompute_ns)
    if kind == "B":
        return layer.backward_ns
    if layer.backward_input_ns is None or layer.backward_weight_ns is None:
        return _part_of_backward(layer, kind, weight_share)
    return layer.backward_input_ns if kind == "I" else layer.backward_weight_ns


def _part_of_backward(layer: LayerCost, kind: str, weight_share: float | None) -> int:
    if weight_share is None:
        raise InputError(
            f"layer {layer.name}: the trace does not split its backward into input and weight "
            f"parts; give backward_input_ns and backward_weight_ns, or --weight-share"
        )
    weight = round(layer.backward_ns * weight_share)
    return weight if kind == "W" else layer.backward_ns - weight
