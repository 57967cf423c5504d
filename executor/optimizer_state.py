"""An optimizer's state and groups with names in the place of parameters, to and from a file."""

import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..traces.errors import InputError, shown
from .masters import Masters
from .quantised import parts_of, rebuilt
from .values import map_tensors, tensors_of
from .weight_file import every_name

MOSTLY = 0.9
"""Memory of which so much is to be saved is saved as it is, not a copy."""

HOW = {"params", "fused", "foreach", "capturable", "differentiable"}
"""Options of a group that say how an update is computed, which a trainer decides for itself."""


def save_optimizer(masters: Masters, path: Path) -> None:
    """Write an optimizer's state. Raises InputError where it holds what cannot be read again."""
    optimizer = masters.optimizer
    names: dict[Any, str] = {each: name for name, each in masters.slices.named()}
    groups = [
        {
            "names": [names[each] for each in group["params"]],
            "options": {key: value for key, value in group.items() if key not in HOW},
        }
        for group in optimizer.param_groups
    ]
    state = {names.get(key, key): each for key, each in optimizer.state.items()}
    with path.open("wb") as file:  # Given a path, torch does not say why it cannot write there.
        torch.save(_to_save({"groups": groups, "state": state}), file)
    try:
        torch.load(path, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        culprit = str(error).partition("Unsupported ")[2].partition("\n")[0] or "an object"
        raise InputError(
            f"optimizer: its state holds more than tensors and plain values: {culprit}"
        ) from None


def _to_save(value: Any) -> Any:
    """The value with tensors on the host, and with nothing else in their memory.

    Torch saves all of the memory that a tensor lies in, and none that tensors of several dtypes do.
    """
    used: dict[int, int] = defaultdict(int)
    dtypes: dict[int, set[torch.dtype]] = defaultdict(set)
    for part in (part for tensor in tensors_of(value) for part in parts_of(tensor)):
        used[part.untyped_storage().data_ptr()] += part.nbytes
        dtypes[part.untyped_storage().data_ptr()].add(part.dtype)

    def alone(part: Tensor) -> Tensor:
        if part.device.type != "cpu":
            return part.detach().cpu()
        place, size = part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()
        ours = used[place] >= MOSTLY * size and len(dtypes[place]) == 1
        return part.detach() if ours else part.detach().clone()

    return map_tensors(lambda tensor: rebuilt(tensor, alone), value)


class OptimizerFile:
    """A file with the state of just such an optimizer. Raises InputError where it is of another."""

    def __init__(self, masters: Masters, path: Path) -> None:
        self._optimizer = masters.optimizer
        self._parameters = every_name(masters.layers) | dict(masters.slices.named())
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self._state, self._saved_groups = saved["state"], saved["groups"]
        mistake = self._other_slices() or self._mistake()
        if mistake:
            raise InputError(f"{shown(path)}: {mistake}")

    def _other_slices(self) -> str | None:
        names = [name for group in self._saved_groups for name in group["names"]]
        here = set().union(*self._groups())
        for name in names:
            whole = name if name in self._parameters else name.rpartition("[")[0]
            if whole == name and f"{name}[0:]" not in self._parameters:
                continue
            there = "whole" if whole == name else "in slices"
            now = "in other slices" if f"{whole}[0:]" in self._parameters else "whole"
            now = now if there == "in slices" else "in slices"
            if now == "whole" and id(self._parameters.get(whole)) not in here:
                return f"{whole!r} was trained there, it is frozen here"
            return (
                f"{whole!r} was updated {there} there, {now} here; "
                "begin with the weights alone: load_weights of the model.safetensors beside it"
            )
        return None

    def _mistake(self) -> str | None:
        there = set().union(*map(self._key_of_saved, self._saved_groups))
        here = set().union(*self._groups())
        for name, each in self._parameters.items():
            if (id(each) in there) != (id(each) in here):
                was, now = ("trained", "frozen") if id(each) in there else ("frozen", "trained")
                return f"{name!r} was {was} there, it is {now} here"
        if set(map(self._key_of_saved, self._saved_groups)) != set(self._groups()):
            return "its parameters are in other groups; make the groups that it was saved with"
        return None

    def _groups(self) -> dict[frozenset[int], dict[str, Any]]:
        groups = self._optimizer.param_groups
        return {frozenset(map(id, group["params"])): group for group in groups}

    def _key_of_saved(self, group: dict[str, Any]) -> frozenset[int]:
        return frozenset(id(self._parameters[name]) for name in group["names"])

    def apply(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Fill the optimizer, in place; `dtypes` are those that the weights had by its side."""
        groups = self._groups()
        for group in self._saved_groups:
            groups[self._key_of_saved(group)].update(group["options"])
        state = self._optimizer.state
        state.clear()
        for name, values in self._state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                state[name] = values
            else:
                whole = name if name in dtypes else name.rpartition("[")[0]
                state[parameter] = _converted(values, dtypes[whole], parameter)


def _converted(values: Any, was: torch.dtype, parameter: nn.Parameter) -> Any:
    """A weight's state; what had the weight's dtype has the new one's."""

    def convert(tensor: Tensor) -> Tensor:
        like_weight = tensor.ndim > 0 and tensor.dtype == was
        return tensor.to(parameter.dtype) if like_weight else tensor

    return map_tensors(convert, values)
