"""The gradients of a step on their way to the optimizer: summed, converted, handed over."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .layers import Layers, Layout
from .values import add_each, copy_each


class Scratch:
    """Memory on the host for one layer's gradients in the masters' dtype, used again and again.

    New memory for each would cost more than the conversion: the system clears its pages.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0, dtype=torch.uint8)

    def converted(
        self, pairs: list[tuple[nn.Parameter, Tensor]]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, gradient in its dtype), until this is called again."""
        other = [each for each, grad in pairs if each.dtype != grad.dtype]
        layout = Layout.of({str(number): each for number, each in enumerate(other)}, None)
        if layout.nbytes > len(self._flat):
            self._flat = torch.empty(layout.nbytes, dtype=torch.uint8)
        places = iter(layout.views(self._flat).values())
        result, copies = [], []
        for parameter, grad in pairs:
            if parameter.dtype != grad.dtype:
                copies.append((next(places), grad))
                grad = copies[-1][0]
            result.append((parameter, grad))
        copy_each(copies)
        return result


class GradientBook:
    """Gradients of one step by parameter, summed over visits and over the layers that share it.

    `feeds`: (task, layer) of the transfers that bring gradients. They are summed by whoever asks
    for the sums, in that order, whichever came first, so that a run can be repeated to the last
    bit. `spent` is told of each gradient that has been added to others.
    """

    def __init__(
        self,
        layers: Layers,
        feeds: Iterable[tuple[int, int]],
        spent: Callable[[Tensor], None] = lambda grad: None,
    ) -> None:
        self._layers, self._spent = layers, spent
        self._sums: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self._fed: dict[int, dict[int, dict[int, Tensor]]] = defaultdict(dict)
        self._turns: dict[int, list[int]] = defaultdict(list)
        for task, layer in feeds:
            for owner in self._owners(layer):
                self._turns[owner].append(task)
        self._lock = threading.Lock()

    def _owners(self, layer: int) -> set[int]:
        return {layer, *self._layers.tied_to(layer)}

    def add(self, layer: int, grads: dict[str, Tensor], task: int | None = None) -> None:
        """Count a layer's gradients in. Their memory becomes the book's.

        task: the feed that brings them, which may still be under way; None: they are there.
        """
        parameters = self._layers.parameters_of(layer)
        parts: dict[int, dict[int, Tensor]] = {owner: {} for owner in self._owners(layer)}
        for name, grad in grads.items():
            key = id(parameters[name])
            parts[self._layers.owner[key]][key] = grad
        with self._lock:
            for owner, part in parts.items():
                if task is None:
                    self._sum(owner, part)
                else:
                    self._fed[owner][task] = part

    def _sum_what_was_fed(self, owner: int) -> None:
        with self._lock:
            fed = self._fed.pop(owner, {})
        # Outside of the lock: other gradients go on coming meanwhile.
        for task in self._turns[owner]:
            if task in fed:
                self._sum(owner, fed[task])

    def _sum(self, owner: int, part: dict[int, Tensor]) -> None:
        sums = self._sums[owner]
        both = [(sums[key], grad) for key, grad in part.items() if key in sums]
        add_each(both)
        for _, grad in both:
            self._spent(grad)
        self._sums[owner] = part | sums

    def assign(
        self, layer: int, scale: Tensor | None, scratch: Scratch | None = None
    ) -> list[Tensor]:
        """Hand the sums to a layer's own parameters as their gradients, in the masters' dtype.

        Those that are converted lie in `scratch` if there is one, until it is used again. Returns
        the sums, which are spent when the parameters have been updated.
        """
        self._sum_what_was_fed(layer)
        sums = self._sums.pop(layer, {})
        mine = self._layers.owned_by(layer).values()
        pairs = [(each, sums[id(each)]) for each in mine if id(each) in sums]
        if scratch is not None:
            pairs = scratch.converted(pairs)
        for parameter, grad in pairs:
            grad = grad.to(parameter.device, parameter.dtype)
            parameter.grad = grad if scale is None else grad.mul_(scale.to(grad.device, grad.dtype))
        return list(sums.values())

    @torch.no_grad()
    def squared_norm(self) -> float:
        """The sum of all squared gradients, in the order of the parameters."""
        for owner in list(self._fed):
            self._sum_what_was_fed(owner)
        places = {id(each): n for n, (_, each) in enumerate(self._layers.named_parameters())}
        norms = [
            torch.linalg.vector_norm(
                grad, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32
            )
            for _, sums in sorted(self._sums.items())
            for _, grad in sorted(sums.items(), key=lambda item: places[item[0]])
        ]
        return float(sum(float(norm) ** 2 for norm in norms))
