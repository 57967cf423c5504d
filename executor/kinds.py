"""Kinds of layers: those that are alike in all but their weights' values cost the same."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layers
from .values import Value, tensors_of

ITS_PLACE = "layer_idx"
"""The attribute by which transformers numbers blocks that are alike."""

_OF_TORCH = frozenset(vars(nn.Module()))


def kind_of(layers: Layers, layer: int, needs: bool, value: Value) -> Hashable:
    """Equal for layers that are alike, with inputs alike; what cannot be compared is not.

    needs: whether the layer's input wants a gradient. Layers that share parameters with earlier
    ones and the last layer, which has the loss, are kinds of their own.
    """
    module = layers.modules[layer]
    if layers.tied_to(layer) or layer == len(layers) - 1:
        return layer
    parameters = [
        (name, each.shape, each.dtype, each.requires_grad, layers.owner[id(each)] == layer)
        for name, each in module.named_parameters()
    ]
    buffers = [(name, _contents(each)) for name, each in module.named_buffers()]
    inputs = [(each.shape, each.dtype) for each in tensors_of(value)]
    parts = [(name, _attributes(part)) for name, part in module.named_modules()]
    return repr((parts, parameters, buffers, inputs, needs))


def _attributes(part: nn.Module) -> Any:
    """A module's class and all that it keeps but parameters, buffers and other modules."""
    ours = type(part).__module__.startswith("transformers.")
    own = {
        name: _comparable(each)
        for name, each in vars(part).items()
        if name not in _OF_TORCH and not (ours and name == ITS_PLACE)
    }
    hooks = {name: _comparable(each) for name, each in vars(part).items() if "hooks" in name}
    return id(type(part)), part.training, sorted(own.items()), sorted(hooks.items())


def _comparable(value: Any) -> Any:
    """A value by which equal ones are known; of an object that is none, which one it is."""
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None):
        return repr(value)
    if isinstance(value, tuple | list | set | frozenset):
        return type(value).__name__, [_comparable(each) for each in value]
    if isinstance(value, dict):
        return [(repr(name), _comparable(each)) for name, each in value.items()]
    if isinstance(value, Tensor):
        return _contents(value)
    return id(value)


def _contents(tensor: Tensor) -> Any:
    """Shape, dtype and values of a tensor."""
    if tensor.is_meta:
        return tensor.shape, tensor.dtype
    flat = tensor.detach().cpu().contiguous().flatten()
    return tensor.shape, tensor.dtype, hash(flat.view(torch.uint8).numpy().tobytes())
