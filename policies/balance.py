"""Balance: the contiguous cut of a model's layers whose slowest stage is as fast as can be."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise


def balanced_cut(layer_ns: Sequence[int], homes: Sequence[int]) -> tuple[int, ...]:
    """Layers per stage, first stage first, such that the slowest stage is the fastest possible.

    `homes` names the device of each stage; there must be no more stages than layers, and each gets
    at least one. The slowest stage is exact: the smallest limit that a greedy packing can keep to.
    Among the cuts that reach it, each boundary in turn goes as near as possible to an even share
    of the whole, the earlier layer on a tie. Where devices have several stages, single layers are
    then shifted away from the slowest device as long as that makes it faster; that second aim is
    a descent, and not always the optimum.
    """
    ends = [0, *accumulate(layer_ns)]
    limit = slowest_stage_ns(layer_ns, len(homes))
    bounds = _even_bounds(ends, len(homes), limit)
    if len(set(homes)) < len(homes):
        bounds = _relieved(bounds, ends, homes, limit)
    return tuple(stop - first for first, stop in pairwise(bounds))


def slowest_stage_ns(layer_ns: Sequence[int], stages: int) -> int:
    """The least time of the slowest stage over all contiguous cuts into `stages` stages."""
    ends = [0, *accumulate(layer_ns)]
    low = max(max(layer_ns), -(-ends[-1] // stages))
    high = ends[-1]
    while low < high:
        middle = (low + high) // 2
        if _fewest_stages(ends, middle) <= stages:
            high = middle
        else:
            low = middle + 1
    return low


def _fewest_stages(ends: list[int], limit: int) -> int:
    stages = bound = 0
    while bound < len(ends) - 1:
        bound = bisect_right(ends, ends[bound] + limit) - 1
        stages += 1
    return stages


def _even_bounds(ends: list[int], stages: int, limit: int) -> list[int]:
    layers, bounds = len(ends) - 1, [0]
    for stage, least in enumerate(_least_bounds(ends, stages, limit), start=1):
        low = max(least, bounds[-1] + 1)
        high = min(layers - (stages - stage), bisect_right(ends, ends[bounds[-1]] + limit) - 1)
        bounds.append(_nearest(ends, stage, stages, low, high))
    return bounds


def _least_bounds(ends: list[int], stages: int, limit: int) -> list[int]:
    """How early each stage may end, so that the stages after it can hold the rest."""
    bounds = [len(ends) - 1]
    for after in range(1, stages):
        least = bisect_left(ends, ends[bounds[-1]] - limit)
        bounds.append(min(least, len(ends) - 1 - after))
    return bounds[::-1]


def _nearest(ends: list[int], stage: int, stages: int, low: int, high: int) -> int:
    """The bound in [low, high] whose time is nearest to stage / stages of the whole."""
    share = ends[-1] * stage
    bound = bisect_left(ends, -(-share // stages), low, high)
    if bound > low and share - ends[bound - 1] * stages <= ends[bound] * stages - share:
        bound = bisect_left(ends, ends[bound - 1], low, bound)
    return bound


def _relieved(bounds: list[int], ends: list[int], homes: Sequence[int], limit: int) -> list[int]:
    load = [0] * (max(homes) + 1)
    for home, (first, stop) in zip(homes, pairwise(bounds), strict=True):
        load[home] += ends[stop] - ends[first]
    while better := next(_reliefs(bounds, ends, homes, limit, load), None):
        bounds, load = better
    return bounds


def _reliefs(
    bounds: list[int], ends: list[int], homes: Sequence[int], limit: int, load: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Bounds and loads after a shift of one layer away from the slowest device.

    A shift moves a row of neighbouring bounds by one layer: the stage at its one end loses a
    layer, the stage at its other end gains one, and those between pass theirs on. All devices
    that it touches must end up faster than the slowest was.
    """
    slowest = max(range(len(load)), key=load.__getitem__)
    for stage in (number for number, home in enumerate(homes) if home == slowest):
        for step in (1, -1):
            yield from _shifts(bounds, ends, homes, limit, load, stage, step)


def _shifts(
    bounds: list[int],
    ends: list[int],
    homes: Sequence[int],
    limit: int,
    load: list[int],
    stage: int,
    step: int,
) -> Iterator[tuple[list[int], list[int]]]:
    new_bounds, new_load, slowest = bounds.copy(), load.copy(), load[homes[stage]]
    bound, touched = stage + (step < 0), {homes[stage]}
    while 0 < bound < len(homes):
        loser, gainer = (bound, bound - 1) if step > 0 else (bound - 1, bound)
        moved = abs(ends[new_bounds[bound] + step] - ends[new_bounds[bound]])
        new_bounds[bound] += step
        new_load[homes[loser]] -= moved
        new_load[homes[gainer]] += moved
        touched.add(homes[gainer])
        first, stop = new_bounds[loser : loser + 2]
        if not 0 < stop - first or ends[stop] - ends[first] > limit:
            return
        first, stop = new_bounds[gainer : gainer + 2]
        if ends[stop] - ends[first] <= limit and all(new_load[d] < slowest for d in touched):
            yield new_bounds.copy(), new_load.copy()
        bound -= step
