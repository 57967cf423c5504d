"""Weights on devices: resident ones for good, streamed ones for a visit."""

from collections import defaultdict, deque

import torch
from torch import Tensor, nn

from .layers import Layers, Layout, Replica, WeightCopy
from .streams import Stream


class DeviceWeights:
    """The weights of the layers that one device has at the moment, and modules to run them with."""

    def __init__(self, layers: Layers, device: torch.device, prepare: object = None) -> None:
        self.device = device
        self._layers = layers
        self._prepare = prepare
        self._replicas: dict[int, Replica] = {}
        self._copies: dict[int, deque[WeightCopy]] = defaultdict(deque)

    def keep(self, layer: int, weights: WeightCopy) -> None:
        """Hold a layer's weights, behind any that are there already."""
        self._copies[layer].append(weights)

    def current(self, layer: int) -> WeightCopy:
        """The weights of the visit at work: the oldest that are here."""
        return self._copies[layer][0]

    def newest(self, layer: int) -> WeightCopy:
        """The weights that are arriving."""
        return self._copies[layer][-1]

    def drop(self, layer: int) -> WeightCopy:
        """Let go of the oldest, in its module too."""
        dropped = self._copies[layer].popleft()
        if layer in self._replicas:
            self._replicas[layer].release(dropped)
        return dropped

    def held(self) -> list[int]:
        """The layers that are here."""
        return [layer for layer, copies in self._copies.items() if copies]

    def modules(self, first: int, stop: int) -> list[nn.Module]:
        """The layers, with the weights of the visit at work."""
        return [self._replica(layer).bind(self.current(layer)) for layer in range(first, stop)]

    def _replica(self, layer: int) -> Replica:
        if layer not in self._replicas:
            replica = Replica(self._layers.modules[layer], self.device)
            if callable(self._prepare):
                self._prepare(replica.module)
            self._replicas[layer] = replica
        return self._replicas[layer]

    def clear(self) -> None:
        """Let go of everything."""
        self._copies.clear()
        self._replicas.clear()


def begin_upload(layout: Layout, device: torch.device, reader: Stream) -> WeightCopy:
    """Room for a layer's weights on a device, to be read by its compute stream."""
    flat = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    reader.reads(flat)
    return WeightCopy(layout.parameters(flat), flat)


def upload_part(weights: WeightCopy, source: Tensor, part: int, parts: int) -> None:
    """Copy one of so many parts of a layer's weights up."""
    assert weights.flat is not None
    first, stop = part_bounds(weights.flat.numel(), part, parts)
    weights.flat[first:stop].copy_(source[first:stop], non_blocking=True)


def part_bounds(nbytes: int, part: int, parts: int) -> tuple[int, int]:
    """Where one of so many parts of a layer's weights begins and stops."""
    return nbytes * part // parts, nbytes * (part + 1) // parts


def resident_copy(
    layers: Layers, layer: int, device: torch.device, compute: torch.dtype | None, own: bool
) -> WeightCopy:
    """A layer's weights on the device that is its home.

    With `own` the masters move there and are used themselves, where their dtype is the compute
    dtype and no earlier layer owns them.
    """
    weights = {}
    for name, each in layers.parameters_of(layer).items():
        mine = layers.owner[id(each)] == layer
        if own and mine:
            each.data = each.data.to(device)
        dtype = compute if compute and each.is_floating_point() else each.dtype
        if own and mine and dtype == each.dtype:
            weights[name] = each
            continue
        copy = torch.empty(each.shape, dtype=dtype, device=device).copy_(each.detach())
        weights[name] = nn.Parameter(copy, requires_grad=each.requires_grad)
    return WeightCopy(weights)


@torch.no_grad()
def refresh_resident(layers: Layers, layer: int, weights: WeightCopy) -> None:
    """Write the masters' values into a resident copy."""
    for name, each in layers.parameters_of(layer).items():
        target = weights.parameters[name]
        if target is not each:
            target.copy_(each, non_blocking=True)
