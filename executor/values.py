"""Values: what passes between layers, a tensor or nested tuples, lists and dicts of them."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .places import gpus_of
from .streams import Stream, mark_now

Value = Any
"""A tensor, or a tuple, list or dict of values; other things in it pass through untouched."""

PIECE_BYTES = 128 * 2**20
"""Large copies between host and GPU: how much at a time.

Streams share copy engines, and an engine keeps to one stream as long as that has anything to copy:
even with two pieces of a large copy under way in turn, what others copy waits for its very end.
"""

Gradients = list[Tensor | None]
"""The gradient of each tensor of a value, in order; None where there is none."""


def tensors_of(value: Value) -> list[Tensor]:
    """The tensors of a value, in order."""
    if isinstance(value, Tensor):
        return [value]  # What pytree would say, ten times as fast; and so below.
    if type(value) is list:
        return [tensor for each in value for tensor in tensors_of(each)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """The value with `function` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is list:
        return [map_tensors(function, each) for each in value]
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def detached(value: Value) -> Value:
    """The value cut off from the graph that made it."""
    return map_tensors(Tensor.detach, value)


def as_leaves(value: Value, needs_grad: bool) -> Value:
    """The value as the start of a new graph, whose floating tensors collect gradients if wanted."""

    def leaf(tensor: Tensor) -> Tensor:
        cut = tensor.detach()
        return cut.requires_grad_() if needs_grad and cut.is_floating_point() else cut

    return map_tensors(leaf, value)


def gradients_of(value: Value) -> Gradients:
    """The gradients that the tensors of a value have collected."""
    return [tensor.grad for tensor in tensors_of(value)]


def moved(value: Value, device: torch.device) -> Value:
    """The value on `device`; itself where it is there already."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def read_on_current_stream(tensor: Tensor) -> None:
    """Keep a tensor's memory from reuse until the current stream is done with it."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def copied(value: Value, device: torch.device, reader: Stream) -> Value:
    """A copy of a value on `device`, never sharing memory with it.

    Made on the current stream; `reader` is the stream that will read it.
    """

    def copy(tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        read_on_current_stream(tensor)
        reader.reads(target)
        return target.copy_(tensor.detach(), non_blocking=True)

    return map_tensors(copy, value)


def copy_each(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, in few calls, for few turns at Python's lock.

    Those that are the same memory stay. To or from a GPU it is done in the order of the current
    stream; the caller waits only for all but the last piece of a large copy.
    """
    pairs = [(target, each) for target, each in pairs if target.data_ptr() != each.data_ptr()]
    devices = {each.device for both in pairs for each in both}
    if len(devices) < 2:
        _copy_at_once(pairs)
        return
    gpus = gpus_of(devices)
    for number, piece in enumerate(in_pieces(pairs, PIECE_BYTES)):
        for gpu in gpus if number else ():
            mark_now(gpu).block()
        _copy_at_once(piece)


def _copy_at_once(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


def in_pieces(
    pairs: list[tuple[Tensor, Tensor]], nbytes: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs of the same shape in lists of about `nbytes`; larger ones that lie in order are cut."""
    piece, room = [], nbytes
    for both in pairs:
        size = nbytes // max(each.element_size() for each in both)
        parts = [both]
        if both[0].numel() > size and all(each.is_contiguous() for each in both):
            parts = list(zip(*(torch.split(each.view(-1), size) for each in both), strict=True))
        for part in parts:
            piece.append(part)
            room -= max(each.nbytes for each in part)
            if room <= 0:
                yield piece
                piece, room = [], nbytes
    if piece:
        yield piece


def add_each(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Add the second of each pair to the first, likewise."""
    if pairs:
        parts = [part.to(each.device) for each, part in pairs]
        torch._foreach_add_([each for each, _ in pairs], parts)


def nbytes_of(value: Value) -> int:
    """Bytes of the tensors of a value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))


def split_batch(value: Value, bounds: list[int]) -> list[Value]:
    """A value cut along the first dimension of its tensors into the parts between the bounds."""
    return [
        map_tensors(lambda tensor, a=first, b=stop: tensor[a:b], value)  # type: ignore[misc]
        for first, stop in pairwise(bounds)
    ]


def batch_size(value: Value) -> int:
    """Size of the first dimension of a value's first tensor."""
    return tensors_of(value)[0].shape[0]


def count_tokens(inputs: Value) -> int:
    """Tokens of a batch, or samples where it has none."""
    first = tensors_of(inputs)[0]
    is_tokens = first.ndim == 2 and not first.is_floating_point()
    return first.numel() if is_tokens else batch_size(inputs)


def looks_of(value: Value) -> str:
    """The shapes and dtypes of a value's tensors, which its costs depend on."""
    return _shown(tuple((each.shape, each.dtype) for each in tensors_of(value)))


@lru_cache
def _shown(looks: tuple[tuple[torch.Size, torch.dtype], ...]) -> str:
    return str([(tuple(shape), str(dtype)) for shape, dtype in looks])
