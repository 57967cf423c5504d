"""Masters: the weights that the optimizer updates, layer by layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..traces.errors import InputError
from .layers import Layers
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
            if isinstance(value, Tensor) and (counts or value.ndim > 0 or _is_like(parameter, name))
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


def _is_like(parameter: Tensor, name: str) -> bool:
    """Whether a state without dimensions is one of a parameter without any, not a count."""
    return parameter.ndim == 0 and name != "step"


def _as_it_is(value: Any) -> Any:
    """A value that does not change when a scheduler changes a tensor in place."""
    return value.clone() if isinstance(value, Tensor) else value
