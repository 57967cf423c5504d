"""Tensors that are made of others, such as an optimizer's quantised states."""

from collections.abc import Callable

from torch import Tensor


def parts_of(value: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(value, name))]


def rebuilt(value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The value with `function` applied to each plain tensor in it."""
    if not hasattr(value, "__tensor_flatten__"):
        return function(value)
    names, context = value.__tensor_flatten__()
    parts = {name: rebuilt(getattr(value, name), function) for name in names}
    rebuild = type(value).__tensor_unflatten__  # type: ignore[attr-defined]
    made: Tensor = rebuild(parts, context, value.shape, value.stride())
    return made
