"""Older weights: in stale mode the next step works on the weights before the last update."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .host_copies import HostCopies
from .layers import Layers


def older_weights(
    layers: Layers, host_copies: Mapping[int, HostCopies], step: int
) -> dict[str, Tensor]:
    """The weights, by the model's names, that step `step` works on and the masters have no more."""
    older = {}
    for layer, copies in host_copies.items():
        owned = layers.owned_by(layer) if len(copies.flats) > 1 else {}
        for name, value in copies.named(step).items():
            if name in owned and not _equal(value, owned[name].detach()):
                older[layers.names[layer][name]] = value
    return older


def _equal(value: Tensor, master: Tensor) -> bool:
    return torch.equal(value, master.to(value.device, value.dtype))


def put_older_weights(
    layers: Layers, host_copies: Mapping[int, HostCopies], older: Mapping[str, Tensor], step: int
) -> None:
    """Let step `step` work on `older` weights, where there is room for them beside the newest."""
    names = {id(each): name for name, each in layers.named_parameters()}
    for layer, copies in host_copies.items():
        parameters = layers.parameters_of(layer)
        for name, view in copies.named(step).items() if len(copies.flats) > 1 else ():
            value = older.get(names[id(parameters[name])])
            if value is not None:
                view.copy_(value)
