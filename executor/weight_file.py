"""WeightFile: a .safetensors file of weights by the model's own names."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..traces.errors import InputError, shown
from .layers import Layers


def load_weights(layers: Layers | Sequence[nn.Module], path: str | Path) -> None:
    """Fill layers with the weights of a .safetensors file, before the first step.

    Every parameter must be there, by the model's own name; one that layers share, by any of its
    names. Buffers may be there. Other dtypes are converted. Raises InputError, with nothing
    changed, where names or shapes do not match.
    """
    WeightFile(layers if isinstance(layers, Layers) else Layers(layers), Path(path)).apply()


def save_weights(layers: Layers, path: Path) -> None:
    """Write all parameters, tied ones once, and persistent buffers."""
    parameters = {name: each.detach() for name, each in layers.named_parameters()}
    # A buffer that several layers share is one tensor with several names.
    buffers = {name: each.detach().clone() for name, each in layers.named_buffers()}
    save_file({n: each.cpu().contiguous() for n, each in (parameters | buffers).items()}, path)


def every_name(layers: Layers) -> dict[str, nn.Parameter]:
    """Parameters by the model's own names, tied ones by each of theirs."""
    return {
        names[name]: parameter
        for names, module in zip(layers.names, layers.modules, strict=True)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in names
    }


class WeightFile:
    """A file of weights that fits these layers. Raises InputError where it does not."""

    def __init__(self, layers: Layers, path: Path) -> None:
        self._path = path
        self._parameters = every_name(layers)
        self._targets: dict[str, Tensor] = {**dict(layers.named_buffers()), **self._parameters}
        mistakes = list(self._mistakes(_shapes(path)))
        if mistakes:
            more = f" (and {len(mistakes) - 1} more)" if mistakes[1:] else ""
            raise InputError(f"{shown(path)}: of another model: {mistakes[0]}{more}")

    def _mistakes(self, shapes: Mapping[str, list[int]]) -> Iterator[str]:
        there = {id(self._parameters[name]) for name in shapes if name in self._parameters}
        for name, each in self._parameters.items():
            if id(each) not in there:
                there.add(id(each))
                yield f"it has no {name!r}"
        for name, shape in shapes.items():
            target = self._targets.get(name)
            if target is None:
                yield f"this model has no {name!r}"
            elif list(target.shape) != shape:
                yield f"{name!r} has shape {shape} there, {list(target.shape)} here"

    @torch.no_grad()
    def apply(self) -> dict[str, torch.dtype]:
        """Fill the layers, in place. Returns the dtypes that the file has."""
        dtypes = {}
        with safe_open(self._path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                self._targets[name].detach().copy_(tensor)
                dtypes[name] = tensor.dtype
        return dtypes


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{shown(path)}: cannot read these weights: {reason}") from None
