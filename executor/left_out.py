"""Left out of a recompute: the products that no gradient needs, such as a block's last one.

What a layer hands on is not needed when it runs again for its backward, and so neither is the
product that only adds to that. torch.utils.checkpoint stops before it, too; in a transformer's
block it is about a quarter of the products.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .deferred import jobs_here
from .linears import Made, apply_linear, is_plain, top_of_hooks

MOST_TRIED = 4
"""So many products are tried, those that a layer makes last."""

FILLS = (math.nan, 1e3, -1e3)
"""What their outputs are made of in trials: whoever branches by a sign does so one way or other."""

CLOSE = 0.01
"""How far apart gradients may be for their size, where a GPU adds in another order each time."""

Names = tuple[str, ...]
"""Of linear layers within a layer."""

Forward = Callable[[Tensor], Tensor]


def linears_of(module: nn.Module, names: Names) -> list[nn.Linear]:
    """The linear layers of these names."""
    parts = [module.get_submodule(name) for name in names]
    return [each for each in parts if isinstance(each, nn.Linear)]


@contextmanager
def leaving_out(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """These linear layers' outputs are whatever lies in memory; their gradients are as ever."""
    with _instead({linear: _by_hand(linear, Tensor.new_empty) for linear in linears}):
        yield


def unneeded_products(
    module: nn.Module,
    forward: Callable[[], Any],
    backward: Callable[[Any], list[Tensor]],
) -> Names:
    """The linear layers of `module` whose outputs no gradient of it needs, by name; by trial.

    Whatever such an output is, NaN among others, all that a forward saves for backward stays the
    same to the bit, and so do gradients, but for what a GPU adds up in another order each time.
    Only plain nn.Linear without hooks are tried that run once. What holds for these inputs is taken
    to hold for others, so a layer must not come to need an output by its input's shape or values.

    forward: runs the module, with the same inputs and random numbers every time.
    backward: from what `forward` has returned, new gradients of the inputs and parameters.
    """
    tried = _last_ones(module, forward)

    def run(without: Collection[str] = (), fill: float = math.nan) -> Any:
        made = partial(_full, fill=fill)
        with _instead(
            {linear: _by_hand(linear, made if name in without else None) for name, linear in tried}
        ):
            return forward()

    if not tried:
        return ()
    saved = _saved_by(run)
    found = tuple(name for name, _ in tried if _saved_by(partial(run, (name,))) == saved)
    if found:
        wanted = backward(run())
        if not all(_are_close(backward(run(found, fill)), wanted) for fill in FILLS):
            return ()
    return found


def _full(like: Tensor, shape: torch.Size, fill: float) -> Tensor:
    return like.new_full(shape, fill)


def _are_close(gradients: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(gradients, wanted, strict=True)
    return all(bool((a - b).norm() <= CLOSE * b.norm()) for a, b in pairs)


def _by_hand(linear: nn.Linear, made: Made | None) -> Forward:
    trained = linear.weight.requires_grad
    return lambda value: apply_linear(linear, value, jobs_here() if trained else None, made)


def _last_ones(module: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, nn.Linear]]:
    """Those that `forward` runs last, once and with gradients, by name."""
    names = {part: name for name, part in module.named_modules() if is_plain(part)}
    ran: list[nn.Linear] = []

    def noting(linear: nn.Linear) -> Forward:
        def noted(value: Tensor) -> Tensor:
            ran.append(linear)
            return functional.linear(value, linear.weight, linear.bias)

        return noted

    with _instead({linear: noting(linear) for linear in names}):
        forward()
    once = (linear for linear in reversed(ran) if ran.count(linear) == 1)
    return [(names[linear], linear) for linear in islice(once, MOST_TRIED)]


def _saved_by(forward: Callable[[], Any]) -> list[tuple[torch.Size, int]]:
    """What a forward saves for backward: of each tensor its shape, and the sum of its bits."""
    saved = []

    def pack(tensor: Tensor) -> None:
        saved.append((tensor.shape, _sum_of_bits(tensor)))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()  # Nothing is kept of it: no backward follows.
    return saved


def _sum_of_bits(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum() + flat[whole:].sum())


@contextmanager
def _instead(forwards: dict[nn.Linear, Forward]) -> Iterator[None]:
    """Let linear layers run so, instead of by what they have; but not inside of checkpoints."""
    before = [(vars(linear), vars(linear).get("forward")) for linear in forwards]
    outside = top_of_hooks()

    def guarded(linear: nn.Linear, forward: Forward) -> Forward:
        def here(value: Tensor) -> Tensor:
            if torch.is_grad_enabled() and top_of_hooks() == outside:
                return forward(value)
            return functional.linear(value, linear.weight, linear.bias)

        return here

    for linear, forward in forwards.items():
        vars(linear)["forward"] = guarded(linear, forward)
    try:
        yield
    finally:
        for attributes, own in before:
            if own is None:
                del attributes["forward"]
            else:
                attributes["forward"] = own
