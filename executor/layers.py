"""Layers: the user's modules, where their parameters live, and copies of them on devices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..traces.errors import InputError

ALIGN_BYTES = 256


class Layers:
    """The layers of a model, in order, and the names of their parameters.

    `names[layer]` maps a layer's own parameter names to the model's; of an nn.Sequential they are
    its own. Parameters that several layers share are tied: the first of the layers owns them.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        names: Sequence[dict[str, str]] | None = None,
    ) -> None:
        self.modules = list(modules)
        if not self.modules:
            raise InputError("layers: there must be at least one")
        numbers = range(len(self.modules))
        titles = modules._modules if isinstance(modules, nn.Sequential) else numbers
        self.names = names or [
            {name: f"{title}.{name}" for name, _ in every_tensor(module)}
            for title, module in zip(titles, self.modules, strict=True)
        ]
        self.owner = _owners(self.modules)
        # Walking modules for their parameters takes longer than many a task.
        self._parameters = [dict(module.named_parameters()) for module in self.modules]
        self._owned = [
            {name: each for name, each in mine.items() if self.owner[id(each)] == layer}
            for layer, mine in enumerate(self._parameters)
        ]
        _refuse_what_cannot_be_trained(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def parameters_of(self, layer: int) -> dict[str, nn.Parameter]:
        """A layer's parameters by its own names; a parameter with two names once."""
        return self._parameters[layer]

    def owned_by(self, layer: int) -> dict[str, nn.Parameter]:
        """Those of a layer's parameters that no earlier layer has."""
        return self._owned[layer]

    def shared_by(self, layer: int) -> dict[str, nn.Parameter]:
        """Those of a layer's parameters that an earlier layer owns."""
        mine = self.owned_by(layer)
        return {n: each for n, each in self.parameters_of(layer).items() if n not in mine}

    def tied_to(self, layer: int) -> set[int]:
        """The earlier layers that own some of this layer's parameters."""
        owners = {self.owner[id(each)] for each in self.parameters_of(layer).values()}
        return owners - {layer}

    def trained_of(self, layer: int) -> list[int]:
        """The earlier layers that own some of the parameters that this one trains."""
        trained = [each for each in self.parameters_of(layer).values() if each.requires_grad]
        return sorted({self.owner[id(each)] for each in trained} - {layer})

    def trained_with(self, layer: int) -> int | None:
        """The first of them, the one whose update is this layer's, too; None: there is none."""
        return next(iter(self.trained_of(layer)), None)

    def refuse_several_owners(self) -> None:
        """Raises InputError where a layer trains parameters of several earlier layers.

        Plans know one owner of a layer's shared parameters, and wait for what goes to that one.
        """
        for layer in range(len(self)):
            owners = self.trained_of(layer)
            if len(owners) > 1:
                raise InputError(
                    f"layers: layer {layer} shares trained parameters with layers "
                    f"{' and '.join(map(str, owners))}; on several devices it may with one: "
                    "put them in one layer, or train on one device"
                )

    def sharing(self, layer: int) -> list[int]:
        """The layer itself, and the later ones that have some of its own parameters."""
        later = range(layer + 1, len(self))
        return [layer, *(each for each in later if layer in self.tied_to(each))]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by the model's own name."""
        for layer in range(len(self)):
            for name, parameter in self.owned_by(layer).items():
                yield self.names[layer][name], parameter

    def trained(self) -> Iterator[nn.Parameter]:
        """Every parameter that is trained, once."""
        return (each for _, each in self.named_parameters() if each.requires_grad)

    def dtype(self) -> torch.dtype:
        """Of the first parameter that is trained; of models with several it stands for all."""
        return next((each.dtype for each in self.trained()), torch.float32)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every persistent buffer, named after the parameters of its layer."""
        for layer, module in enumerate(self.modules):
            kept = module.state_dict()
            for name, buffer in module.named_buffers():
                if name in kept:
                    yield self.names[layer].get(name, f"{layer}.{name}"), buffer

    def needs_gradient(self) -> list[bool]:
        """For each boundary, whether any layer up to it is trained."""
        found, flags = False, []
        for module in self.modules:
            found = found or any(each.requires_grad for each in module.parameters())
            flags.append(found)
        return flags


def every_tensor(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _owners(modules: Sequence[nn.Module]) -> dict[int, int]:
    owner: dict[int, int] = {}
    for layer, module in enumerate(modules):
        for parameter in module.parameters():
            owner.setdefault(id(parameter), layer)
    return owner


def _refuse_what_cannot_be_trained(modules: Sequence[nn.Module]) -> None:
    for layer, module in enumerate(modules):
        for name, part in module.named_modules():
            where = f"layer {layer}: {name or type(part).__name__}"
            if getattr(part, "track_running_stats", False) and part.training:
                raise InputError(
                    f"{where} keeps running statistics, which microbatches and recompute would "
                    "change; use another norm, or eval() it"
                )
            sparse = isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
            if sparse and part.weight.requires_grad:
                raise InputError(f"{where} makes sparse gradients; give it sparse=False")


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in a layer's flat buffer."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size
    requires_grad: bool


@dataclass(frozen=True)
class Layout:
    """A layer's parameters one behind the other in one buffer of bytes, in the compute dtype."""

    slots: tuple[Slot, ...]
    nbytes: int

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], compute: torch.dtype | None) -> "Layout":
        """The layout of these parameters; floating ones in `compute` unless that is None."""
        slots, place = [], 0
        for name, each in parameters.items():
            dtype = compute if compute and each.is_floating_point() else each.dtype
            size = each.numel() * dtype.itemsize
            slot = Slot(name, place, place + size, dtype, each.shape, each.requires_grad)
            slots.append(slot)
            place += -(-size // ALIGN_BYTES) * ALIGN_BYTES
        return cls(tuple(slots), place)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters' tensors in a flat buffer of bytes, in order."""
        typed = {dtype: flat.view(dtype) for dtype in {slot.dtype for slot in self.slots}}
        return {
            slot.name: torch.as_strided(
                typed[slot.dtype],
                slot.shape,
                contiguous_strides(slot.shape),
                typed[slot.dtype].storage_offset() + slot.start // slot.dtype.itemsize,
            )
            for slot in self.slots
        }

    def parameters(self, flat: Tensor) -> dict[str, nn.Parameter]:
        """Leaves of a new graph that lie in a flat buffer."""
        views = self.views(flat)
        return {
            slot.name: nn.Parameter(views[slot.name], requires_grad=slot.requires_grad)
            for slot in self.slots
        }


@lru_cache(maxsize=1024)
def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a tensor of this shape that lies in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Replica:
    """A copy of a layer for one device, whose parameters are set anew for every visit."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        # Parameters are left out of the copy: they are set later, and may be large.
        memo = {
            id(each): nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
            for each in module.parameters()
        }
        self.module: nn.Module = deepcopy(module, memo)
        for part in self.module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    real = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer
                    part._buffers[name] = real.to(device)
        self._places = _places(module, self.module)
        self.bound: WeightCopy | None = None

    def bind(self, weights: "WeightCopy") -> nn.Module:
        """The module with these weights."""
        if self.bound is not weights:
            for part, leaf, name in self._places:
                part._parameters[leaf] = weights.parameters[name]
            self.bound = weights
        return self.module

    def release(self, weights: "WeightCopy") -> None:
        """Have no part in keeping these weights in memory."""
        if self.bound is weights:
            for part, leaf, _ in self._places:
                part._parameters[leaf] = None
            self.bound = None


def _places(module: nn.Module, copy: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(part, attribute, canonical name) for every place that holds a parameter."""
    canonical = {id(each): name for name, each in module.named_parameters()}
    parts = dict(copy.named_modules(remove_duplicate=False))
    places = []
    for name, each in module.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        places.append((parts[path], leaf, canonical[id(each)]))
    return places


@dataclass
class WeightCopy:
    """A layer's weights on one device, and the gradients that they collect."""

    parameters: dict[str, nn.Parameter]
    flat: Tensor | None = field(default=None, repr=False)

    def take_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The gradients so far of these parameters (None: of all); they have none afterwards."""
        grads = {}
        for name in self.parameters if names is None else names:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                grads[name] = parameter.grad
                parameter.grad = None
        return grads
