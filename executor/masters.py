"""Masters: the weights that the optimizer updates, and what is uploaded from them."""

import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..traces.errors import InputError
from .layers import Layers, Layout

OptimizerFactory = Callable[[Any], Optimizer]


class Masters:
    """One torch optimizer over all parameters, stepped layer by layer.

    The optimizer's own `param_groups` and `state` are the user's to read and to schedule: each
    layer's step works on the same state, with the hyperparameters that the groups have then.
    """

    def __init__(self, layers: Layers, factory: OptimizerFactory, groups: Any = None) -> None:
        self.layers = layers
        trained = {name: each for name, each in layers.named_parameters() if each.requires_grad}
        if not trained:
            raise InputError("layers: no parameter requires a gradient; there is nothing to train")
        self.optimizer = factory(_groups(trained, groups))
        if type(self.optimizer).__name__ == "LBFGS":
            raise InputError("optimizer: LBFGS needs all parameters at once; use another")
        self._parts = [self._part(layer) for layer in range(len(layers))]

    def _part(self, layer: int) -> Optimizer | None:
        """The optimizer with only the parameters that a layer owns; shares state with the whole."""
        mine = {id(each) for each in self.layers.owned_by(layer).values()}
        part = copy(self.optimizer)
        part.state = self.optimizer.state
        part.param_groups = [
            {**group, "params": [each for each in group["params"] if id(each) in mine]}
            for group in self.optimizer.param_groups
        ]
        return part if any(group["params"] for group in part.param_groups) else None

    def step(self, layer: int) -> None:
        """Update a layer's own parameters from their gradients, and drop those."""
        part = self._parts[layer]
        if part is None:
            return
        for mine, whole in zip(part.param_groups, self.optimizer.param_groups, strict=True):
            mine.update({name: value for name, value in whole.items() if name != "params"})
        part.step()
        part.zero_grad(set_to_none=True)
        # Schedulers look here to see that the optimizer has stepped before them.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def to_host(self) -> None:
        """Bring all parameters and their optimizer state back to the host."""
        for layer in range(len(self.layers)):
            self.move(layer, torch.device("cpu"))

    def move(self, layer: int, device: torch.device) -> None:
        """Move a layer's own parameters and their optimizer state to a device."""
        for each in self.layers.owned_by(layer).values():
            each.data = each.data.to(device)
        self.settle(layer)

    def settle(self, *layers: int) -> None:
        """Bring the optimizer's state of these layers (none: of all) to where their weights are."""
        groups = self.optimizer.param_groups
        # The count of steps stays on the host, unless kernels on the device read it.
        counts = any(group.get("fused") or group.get("capturable") for group in groups)
        for layer in layers or range(len(self.layers)):
            for each in self.layers.owned_by(layer).values():
                state = self.optimizer.state.get(each, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and (counts or value.ndim > 0):
                        state[name] = value.to(each.device)

    def state_of(self, layer: int) -> Iterable[dict[str, Any]]:
        """The optimizer's state of each of a layer's own parameters."""
        for each in self.layers.owned_by(layer).values():
            if each in self.optimizer.state:
                yield self.optimizer.state[each]


def _groups(trained: dict[str, nn.Parameter], groups: Any) -> Any:
    """The optimizer's argument: all parameters, or the groups that the user makes of them."""
    if groups is None:
        return list(trained.values())
    made = list(groups(trained))
    given = [id(each) for group in made for each in group["params"]]
    if sorted(given) != sorted(map(id, trained.values())):
        raise InputError(
            "parameter_groups: every trained parameter must be in exactly one group, "
            f"got {len(given)} of {len(trained)}"
        )
    return made


class HostCopies:
    """What a layer's uploads read: its weights in the compute dtype, in pinned memory.

    `copies` is 2 where a step works on older weights while newer ones are made. Where one copy in
    the masters' own dtype is enough, the masters themselves lie in it.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        owned: Container[str],
        compute: torch.dtype | None,
        copies: int,
        pin: bool,
    ) -> None:
        self.layout = Layout.of(parameters, compute)
        self._parameters = parameters
        self.flats = [
            torch.empty(self.layout.nbytes, dtype=torch.uint8, pin_memory=pin)
            for _ in range(copies)
        ]
        for number in range(copies):
            self.refresh(number)
        for slot in self.layout.slots:
            each = parameters[slot.name]
            if copies == 1 and slot.name in owned and slot.dtype == each.dtype:
                each.data = slot.view(self.flats[0])

    def flat(self, step: int) -> Tensor:
        """The copy that step number `step` works on."""
        return self.flats[step % len(self.flats)]

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Write the masters' values into the copy of step number `step`."""
        flat = self.flat(step)
        for slot in self.layout.slots:
            target, source = slot.view(flat), self._parameters[slot.name].data
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)


class GradientBook:
    """Gradients of one step by parameter, summed over visits and over the layers that share it."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._sums: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self._lock = threading.Lock()

    def add(self, layer: int, grads: dict[str, Tensor]) -> None:
        """Count a layer's gradients in. Their memory becomes the book's."""
        parameters = self._layers.parameters_of(layer)
        with self._lock:
            for name, grad in grads.items():
                parameter = parameters[name]
                sums = self._sums[self._layers.owner[id(parameter)]]
                if id(parameter) in sums:
                    sums[id(parameter)].add_(grad.to(sums[id(parameter)].device))
                else:
                    sums[id(parameter)] = grad

    def assign(self, layer: int, scale: Tensor | None) -> None:
        """Hand the sums to a layer's own parameters as their gradients, in the masters' dtype."""
        sums = self._sums.pop(layer, {})
        for parameter in self._layers.owned_by(layer).values():
            grad = sums.get(id(parameter))
            if grad is None:
                continue
            grad = grad.to(parameter.device, parameter.dtype)
            parameter.grad = grad if scale is None else grad.mul_(scale.to(grad.device, grad.dtype))

    @torch.no_grad()
    def squared_norm(self) -> float:
        """The sum of all squared gradients."""
        norms = [
            torch.linalg.vector_norm(
                grad, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32
            )
            for sums in self._sums.values()
            for grad in sums.values()
        ]
        return float(sum(float(norm) ** 2 for norm in norms))
