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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .deferred import jobs_here
from .linears import Made, apply_linear, is_plain, top_of_hooks

MOST_TRIED = 4
"""So many products are tried, those that a layer makes last."""

FILLS = (0.0, math.nan, math.inf, 1e3, -1e3)
"""What their outputs are made of in trials; zeros come first, which a step takes, too."""

CLOSE = 0.01
"""How far apart gradients may be for their size, where a GPU adds in another order each time."""


class LeftOut(NamedTuple):
    """The linear layers of a layer that are left out, by name, for inputs that look so."""

    names: tuple[str, ...] = ()
    inputs: str = ""


Forward = Callable[[Tensor], Tensor]


def linears_of(module: nn.Module, names: Iterable[str]) -> list[nn.Linear]:
    """The linear layers of these names."""
    parts = [module.get_submodule(name) for name in names]
    return [each for each in parts if isinstance(each, nn.Linear)]


@contextmanager
def leaving_out(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """These linear layers' outputs are zeros; their gradients are as ever."""
    with _instead({linear: _by_hand(linear, filled) for linear in linears}):
        yield


def filled(like: Tensor, shape: torch.Size, fill: float = FILLS[0]) -> Tensor:
    """What there is instead of a product."""
    return like.new_full(shape, fill)


def unneeded_products(
    module: nn.Module,
    forward: Callable[[], Any],
    backward: Callable[[Any], list[Tensor]],
) -> tuple[str, ...]:
    """The linear layers of `module` whose outputs no gradient of it needs, by name; by trial.

    Whatever such an output is, all that a forward saves for backward has the same bits, in sum, and
    gradients are those of the module itself, but for what a GPU adds up in another order each time.
    Only plain nn.Linear without hooks are tried that run once. Where a trial goes wrong there are
    none: it is not what is to be trained.

    forward: runs the module, with the same inputs and random numbers every time.
    backward: from what `forward` has returned, new gradients of the inputs and parameters.
    """
    if any(map(_is_compiled, module.modules())):
        return ()
    try:
        return _tried(module, forward, backward)
    except Exception:
        return ()


def _is_compiled(part: nn.Module) -> bool:
    """It would be compiled anew for each trial."""
    return type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None


def _tried(
    module: nn.Module,
    forward: Callable[[], Any],
    backward: Callable[[Any], list[Tensor]],
) -> tuple[str, ...]:
    tried = _last_ones(module, forward)

    def run(without: Collection[str] = (), fill: float = FILLS[0]) -> Any:
        made = partial(filled, fill=fill)
        with _instead(
            {linear: _by_hand(linear, made if name in without else None) for name, linear in tried}
        ):
            return forward()

    if not tried:
        return ()
    _, wanted = _saving(run)
    found = tuple(name for name, _ in tried if _saving(partial(run, (name,)))[1] == wanted)
    if not found:
        return ()
    gradients = backward(forward())
    for fill in FILLS:
        output, saved = _saving(partial(run, found, fill))
        if saved != wanted or not _are_close(backward(output), gradients):
            return ()
    return found


def _are_close(gradients: list[Tensor], wanted: list[Tensor]) -> bool:
    if len(gradients) != len(wanted):
        return False
    for one, other in zip(gradients, wanted, strict=True):
        wide = torch.promote_types(other.dtype, torch.float32)
        one, other = one.to(wide), other.to(wide)
        if not (one - other).norm() <= CLOSE * other.norm():
            return False
    return True


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
            return apply_linear(linear, value, None)

        return noted

    with _instead({linear: noting(linear) for linear in names}):
        forward()
    once = (linear for linear in reversed(ran) if ran.count(linear) == 1)
    return [(names[linear], linear) for linear in islice(once, MOST_TRIED)]


def _saving(forward: Callable[[], Any]) -> tuple[Any, list[tuple[torch.Size, int]]]:
    """What a forward returns, and of each tensor it saves the shape and the sum of its bits."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.shape, _sum_of_bits(tensor)))
        return tensor.detach()  # An output that its own graph holds would stay in memory.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, saved


def _sum_of_bits(tensor: Tensor) -> int:
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, 1)  # What is expanded is there once.
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
        def here(input: Tensor) -> Tensor:
            if torch.is_grad_enabled() and top_of_hooks() == outside:
                return forward(input)
            return functional.linear(input, linear.weight, linear.bias)

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
