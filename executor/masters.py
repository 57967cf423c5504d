"""Masters: the weights that the optimizer updates, and what is uploaded from them."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..traces.errors import InputError
from .host_memory import host_bytes
from .layers import Layers, Layout
from .slices import Slices

OptimizerFactory = Callable[[Any], Optimizer]

Settings = list[dict[str, Any]]
"""The hyperparameters of each group."""


class Masters:
    """One torch optimizer over all parameters, stepped layer by layer.

    The optimizer's own `param_groups` and `state` are the user's to read and to schedule: each
    layer's step works on the same state, with the hyperparameters of when the whole step began. Of
    a very large weight they may have its slices instead (`slices.of`).
    """

    def __init__(self, layers: Layers, factory: OptimizerFactory, groups: Any = None) -> None:
        self.layers = layers
        trained = {name: each for name, each in layers.named_parameters() if each.requires_grad}
        if not trained:
            raise InputError("layers: no parameter requires a gradient; there is nothing to train")
        for each in trained.values():
            # Fused kernels take a weight and its gradient for one as the other lies in memory.
            each.data = each.data.contiguous()
        self.optimizer = factory(_groups(trained, groups))
        if type(self.optimizer).__name__ == "LBFGS":
            raise InputError("optimizer: LBFGS needs all parameters at once; use another")
        self.slices = Slices(layers, self.optimizer)
        self._parts = [self._part(layer) for layer in range(len(layers))]

    def _part(self, layer: int) -> Optimizer | None:
        """The optimizer with only the parameters that a layer owns; shares state with the whole."""
        owned = self.layers.owned_by(layer).values()
        mine = {id(part) for each in owned for part in self.slices.of(each)}
        # Not by copy(), which leaves out what a class of its own keeps beside groups and state.
        part: Optimizer = object.__new__(type(self.optimizer))
        part.__dict__.update(vars(self.optimizer))
        part.state = self.optimizer.state
        part.param_groups = [
            {**group, "params": [each for each in group["params"] if id(each) in mine]}
            for group in self.optimizer.param_groups
        ]
        return part if any(group["params"] for group in part.param_groups) else None

    def settings(self) -> Settings:
        """What the groups say now, such as the learning rate: a step takes it when it begins."""
        return [
            {name: _as_it_is(value) for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]

    def step(self, layer: int, settings: Settings) -> None:
        """Update a layer's own parameters from their gradients, and drop those."""
        part = self._parts[layer]
        if part is None:
            return
        for mine, group in zip(part.param_groups, settings, strict=True):
            mine.update(group)
        self.slices.bind(layer)
        part.step()
        part.zero_grad(set_to_none=True)

    def note_step(self) -> None:
        """Schedulers look here to see that the optimizer has stepped before them."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def to_host(self) -> None:
        """Bring all parameters and their optimizer state back to the host."""
        for _, each in self.layers.named_parameters():
            each.data = each.data.cpu()
        self.bind()
        self.settle()

    def bind(self) -> None:
        """All slices follow where the parameters are now."""
        for layer in range(len(self.layers)):
            self.slices.bind(layer)

    def settle(self) -> None:
        """Bring the optimizer's state to where the weights are."""
        for _, each in self.layers.named_parameters():
            for part in self.slices.of(each):
                state = self.optimizer.state.get(part, {})
                for name, value in self.large_states(part).items():
                    state[name] = value.to(each.device)

    def large_states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, or slice of one, that has to be where it is updated.

        The count of steps stays on the host, unless kernels on the device read it.
        """
        groups = self.optimizer.param_groups
        counts = any(group.get("fused") or group.get("capturable") for group in groups)
        return {
            name: value
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and (counts or value.ndim > 0)
        }


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


def _as_it_is(value: Any) -> Any:
    """A value that does not change when a scheduler changes a tensor in place."""
    return value.clone() if isinstance(value, Tensor) else value


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
        sizes = [-(-each.nbytes // 64) * 64 for each, grad in pairs if each.dtype != grad.dtype]
        if sum(sizes) > len(self._flat):
            self._flat = torch.empty(sum(sizes), dtype=torch.uint8)
        room = iter(torch.split(self._flat[: sum(sizes)], sizes))
        copies: list[tuple[Tensor, Tensor]] = []
        result = []
        for parameter, grad in pairs:
            if parameter.dtype != grad.dtype:
                place = next(room)[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
                copies.append((place, grad))
                grad = place
            result.append((parameter, grad))
        _copy_each(copies)
        return result


def _copy_each(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first: all in one call, for one turn at Python's lock."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(list(targets), list(sources))


class HostCopies:
    """What a layer's uploads read: its weights in the compute dtype, in pinned memory.

    `copies` is 2 where a step works on older weights while newer ones are made. Where one copy in
    the masters' own dtype is enough, the masters themselves lie in it: `lent` names them.
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
        self.flats = [host_bytes(self.layout.nbytes, pin) for _ in range(copies)]
        self.lent = {
            slot.name
            for slot in self.layout.slots
            if copies == 1 and slot.name in owned and slot.dtype == parameters[slot.name].dtype
        }
        for number in range(copies):
            self.refresh(number)
        for slot in self.layout.slots:
            if slot.name in self.lent:
                parameters[slot.name].data = slot.view(self.flats[0])

    def flat(self, step: int) -> Tensor:
        """The copy that step number `step` works on."""
        return self.flats[step % len(self.flats)]

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Write the masters' values into the copy of step number `step`."""
        flat = self.flat(step)
        pairs = [(slot.view(flat), self._parameters[slot.name].data) for slot in self.layout.slots]
        _copy_each(
            [(target, each) for target, each in pairs if target.data_ptr() != each.data_ptr()]
        )


class GradientBook:
    """Gradients of one step by parameter, summed over visits and over the layers that share it.

    `feeds`: (task, layer) of the transfers that bring gradients, which are summed in that order,
    whichever comes first, so that a run can be repeated to the last bit. `spent` is told of each
    gradient that has been added to others.
    """

    def __init__(
        self,
        layers: Layers,
        feeds: Iterable[tuple[int, int]],
        spent: Callable[[Tensor], None] = lambda grad: None,
    ) -> None:
        self._layers, self._spent = layers, spent
        self._sums: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self._early: dict[int, dict[int, dict[int, Tensor]]] = defaultdict(dict)
        self._turns: dict[int, deque[int]] = defaultdict(deque)
        for task, layer in feeds:
            for owner in self._owners(layer):
                self._turns[owner].append(task)
        self._lock = threading.Lock()

    def _owners(self, layer: int) -> set[int]:
        return {layer, *self._layers.tied_to(layer)}

    def add(
        self,
        layer: int,
        grads: dict[str, Tensor],
        task: int | None = None,
        is_there: bool = True,
    ) -> None:
        """Count a layer's gradients in, those of a feed when its turn comes.

        Their memory becomes the book's. `is_there` False: they are still on their way, and are
        summed by whoever waits for the feeds, when the sums are asked for.
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
                    self._early[owner][task] = part
                    if is_there:
                        self._sum_those_whose_turn_it_is(owner)

    def _sum_those_whose_turn_it_is(self, owner: int) -> None:
        turns, early = self._turns[owner], self._early[owner]
        while turns and turns[0] in early:
            self._sum(owner, early.pop(turns.popleft()))

    def _sum(self, owner: int, part: dict[int, Tensor]) -> None:
        sums = self._sums[owner]
        for key, grad in part.items():
            if key in sums:
                sums[key].add_(grad.to(sums[key].device))
                self._spent(grad)
            else:
                sums[key] = grad

    def assign(
        self, layer: int, scale: Tensor | None, scratch: "Scratch | None" = None
    ) -> list[Tensor]:
        """Hand the sums to a layer's own parameters as their gradients, in the masters' dtype.

        Those that are converted lie in `scratch` if there is one, until it is used again. Returns
        the sums, which are spent when the parameters have been updated.
        """
        with self._lock:
            self._sum_those_whose_turn_it_is(layer)
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
        with self._lock:
            for owner in list(self._early):
                self._sum_those_whose_turn_it_is(owner)
        places = {id(each): n for n, (_, each) in enumerate(self._layers.named_parameters())}
        norms = [
            torch.linalg.vector_norm(
                grad, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32
            )
            for _, sums in sorted(self._sums.items())
            for _, grad in sorted(sums.items(), key=lambda item: places[item[0]])
        ]
        return float(sum(float(norm) ** 2 for norm in norms))
