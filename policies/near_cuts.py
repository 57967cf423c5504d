"""Cuts that are like another one: finer at a step's ends, or a small change away."""

from collections.abc import Callable, Iterator

from .asymmetric import AsymmetricCut

Sizes = tuple[int, ...]

TRIES = 120
"""Cuts that a descent times before it takes the best so far."""


def finer(cut: AsymmetricCut) -> Iterator[AsymmetricCut]:
    """Cuts that cost more visits and leave less to do at a step's ends.

    The first visit waits for its weights, and behind the last one its gradients come down and its
    layers are updated: with one layer there, or with all stages smaller, that is short.
    """
    forward, backward = cut.forward, cut.backward
    first = (1, forward[0] - 1) if forward and forward[0] > 1 else forward[:1]
    last = (backward[-1] - 1, 1) if backward[-1] > 1 and len(backward) > 1 else backward[-1:]
    yield AsymmetricCut((*first, *forward[1:]), (*backward[:-1], *last))
    for parts in (2, 4, max((*forward, *backward[1:]), default=1)):
        yield AsymmetricCut(
            _in_parts(forward, parts), (backward[0], *_in_parts(backward[1:], parts))
        )


def backward_in_ones(cut: AsymmetricCut) -> AsymmetricCut:
    """The cut with one layer in each backward stage but the first.

    Of a visit to one layer a recompute leaves out the most, and the last ends soonest.
    """
    first, *others = cut.backward
    return AsymmetricCut(cut.forward, (first, *(1,) * sum(others)))


def descended(
    cut: AsymmetricCut,
    step_ns: Callable[[AsymmetricCut], int],
    fits: Callable[[AsymmetricCut], bool],
) -> AsymmetricCut:
    """Where the best of the small changes, taken again and again, leads from a cut."""
    times = {cut: step_ns(cut)}
    while len(times) < TRIES:
        new = [each for each in dict.fromkeys(_near(cut)) if each not in times]
        times |= {each: step_ns(each) for each in new}
        quicker = sorted((each for each in new if times[each] < times[cut]), key=times.__getitem__)
        better = next(filter(fits, quicker), None)
        if better is None:
            break
        cut = better
    return cut


def _near(cut: AsymmetricCut) -> Iterator[AsymmetricCut]:
    """Fewer or more forward stages, or backward ones, or a first backward stage of other size.

    What that stage holds is not recomputed, but kept from its forward for all that it takes.
    """
    forward, (head, *others) = cut.forward, cut.backward
    backward = tuple(others)
    for sizes in _regrouped(forward):
        yield AsymmetricCut(sizes, cut.backward)
    for sizes in _regrouped(backward):
        yield AsymmetricCut(forward, (head, *sizes))
    if len(forward) == 0 or sum(forward) != sum(backward):
        return  # The first backward stage runs no forward.
    for more in (1, 2, 4, -1):
        if 0 < head + more <= head + sum(forward) - 1:
            front = _shortened(forward[::-1], more)[::-1]
            yield AsymmetricCut(front, (head + more, *_shortened(backward, more)))


def _regrouped(sizes: Sizes) -> Iterator[Sizes]:
    if len(sizes) > 1:
        yield (sum(sizes),)
        yield tuple(sum(sizes[place : place + 2]) for place in range(0, len(sizes), 2))
        yield (sizes[0] + sizes[1], *sizes[2:])
        yield (*sizes[:-2], sizes[-2] + sizes[-1])
    if max(sizes, default=1) > 1:
        yield _in_parts(sizes, 2)
        yield _in_parts(sizes, max(sizes))
    if sizes and sizes[-1] > 1:
        yield (*sizes[:-1], sizes[-1] - 1, 1)


def _shortened(sizes: Sizes, count: int) -> Sizes:
    """Stages without the `count` layers that come first, or with so many more there."""
    if count < 0:
        return (sizes[0] - count, *sizes[1:])
    while count:
        taken = min(count, sizes[0])
        sizes = sizes[1:] if taken == sizes[0] else (sizes[0] - taken, *sizes[1:])
        count -= taken
    return sizes


def _in_parts(sizes: Sizes, parts: int) -> Sizes:
    """Each size in so many parts, as even as they get, or in ones."""
    result: list[int] = []
    for size in sizes:
        count = min(parts, size)
        result += [size * (n + 1) // count - size * n // count for n in range(count)]
    return tuple(result)
