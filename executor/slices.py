"""Slices: large weights that an optimizer updates some rows at a time, to need room for those."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers import Layers

MOST = 2**27
"""A weight with more elements is updated in slices."""

BY_ELEMENT = ("torch.optim", "torchao.optim", f"{__package__}.low_bit")
"""Packages whose optimizers update each element, or block of a row, by itself."""

NOT_BY_ELEMENT = ("Adafactor", "Muon", "LBFGS")
"""Those of them that do not."""


class Slices:
    """The parameters that an optimizer has: the layers' own, or instead of a large one its slices.

    The optimizer's groups are changed so, before it has any state. Of a slice, `all_rows` says how
    many rows the whole has.
    """

    def __init__(self, layers: Layers, optimizer: Optimizer) -> None:
        self._layers = layers
        self._of: dict[nn.Parameter, list[nn.Parameter]] = {}
        if not is_by_element(optimizer):
            return
        for _, each in layers.named_parameters():
            if each.requires_grad and each.ndim >= 2 and each.numel() > MOST:
                parts = torch.split(each.data, _rows(each))
                self._of[each] = [nn.Parameter(part) for part in parts]
                for part in self._of[each]:
                    part.all_rows = each.shape[0]  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["params"] = [part for each in group["params"] for part in self.of(each)]

    def of(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """What the optimizer has of a parameter."""
        return self._of.get(parameter, [parameter])

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that an optimizer may have, by the model's own names and the slices' first rows."""
        for name, each in self._layers.named_parameters():
            if each not in self._of:
                yield name, each
                continue
            for number, part in enumerate(self._of[each]):
                yield f"{name}[{number * _rows(each)}:]", part

    def bind(self, layer: int) -> None:
        """Have the slices of a layer's parameters where these are now, with their gradients.

        To be called whenever these have moved, else the slices keep where they were in memory.
        """
        for each in self._layers.owned_by(layer).values():
            if each in self._of:
                grads: Sequence[Tensor | None] = [None] * len(self._of[each])
                if each.grad is not None:
                    grads = torch.split(each.grad, _rows(each))
                parts = torch.split(each.data, _rows(each))
                for mine, part, grad in zip(self._of[each], parts, grads, strict=True):
                    mine.data, mine.grad = part, grad
                each.grad = None


def _rows(parameter: Tensor) -> int:
    """Rows of a slice, all as even as they get."""
    count = -(-parameter.numel() // MOST)
    return -(-parameter.shape[0] // count)


def is_by_element(optimizer: Optimizer) -> bool:
    """Whether an optimizer may be given slices of weights."""
    kind = type(optimizer)
    known = f"{kind.__module__}.".startswith(tuple(f"{each}." for each in BY_ELEMENT))
    return known and kind.__name__ not in NOT_BY_ELEMENT
