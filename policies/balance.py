"""Balance: the contiguous cut of a model's layers whose slowest stage is as fast as can be."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    cut = _Cut([0, *accumulate(layer_ns)], homes, slowest_stage_ns(layer_ns, len(homes)))
    bounds = cut.even_bounds()
    if len(set(homes)) < len(homes):
        bounds = cut.relieved(bounds)
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


@dataclass(frozen=True)
class _Cut:
    """Cuts of layers that end at times `ends` into a stage per entry of `homes`, none over `limit`.

    `bounds[s]` is the first layer of stage `s`; the last bound is the number of layers.
    """

    ends: list[int]
    homes: Sequence[int]
    limit: int

    def even_bounds(self) -> list[int]:
        """The bounds that lie nearest to even shares, the first one first."""
        layers, stages = len(self.ends) - 1, len(self.homes)
        bounds = [0]
        for stage, least in enumerate(self._least_bounds(), start=1):
            most = bisect_right(self.ends, self.ends[bounds[-1]] + self.limit) - 1
            low, high = max(least, bounds[-1] + 1), min(most, layers - (stages - stage))
            bounds.append(self._nearest(stage, low, high))
        return bounds

    def relieved(self, bounds: list[int]) -> list[int]:
        """`bounds` after all shifts that make the slowest device faster."""
        load = [0] * (max(self.homes) + 1)
        for stage, home in enumerate(self.homes):
            load[home] += self._stage_ns(bounds, stage)
        while better := next(self._reliefs(bounds, load), None):
            bounds, load = better
        return bounds

    def _stage_ns(self, bounds: list[int], stage: int) -> int:
        return self.ends[bounds[stage + 1]] - self.ends[bounds[stage]]

    def _least_bounds(self) -> list[int]:
        """How early each stage may end, so that the stages after it can hold the rest."""
        layers = len(self.ends) - 1
        bounds = [layers]
        for after in range(1, len(self.homes)):
            least = bisect_left(self.ends, self.ends[bounds[-1]] - self.limit)
            bounds.append(min(least, layers - after))
        return bounds[::-1]

    def _nearest(self, stage: int, low: int, high: int) -> int:
        """The bound in [low, high] nearest in time to the even share of stages before it."""
        ends, stages = self.ends, len(self.homes)
        share = ends[-1] * stage
        bound = bisect_left(ends, -(-share // stages), low, high)
        if bound > low and abs(ends[bound - 1] * stages - share) <= ends[bound] * stages - share:
            bound -= 1
        return bisect_left(ends, ends[bound], low, bound)

    def _reliefs(self, bounds: list[int], load: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Bounds and loads after a shift of a layer away from the slowest device."""
        slowest = load.index(max(load))
        for stage in (number for number, home in enumerate(self.homes) if home == slowest):
            yield from self._shifts(bounds, load, stage, 1)
            yield from self._shifts(bounds, load, stage, -1)

    def _shifts(
        self, bounds: list[int], load: list[int], stage: int, step: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Bounds and loads after `stage` gave a layer to one before it (step 1) or after it (-1).

        The stages between pass a layer on. No stage may get slower than the limit, and every
        device that takes part must end up faster than the one of `stage` was.
        """
        homes, most = self.homes, load[self.homes[stage]]
        bounds, load, touched = bounds.copy(), load.copy(), {homes[stage]}
        moving = stage if step > 0 else stage + 1
        while 0 < moving < len(homes):
            giver, taker = (moving, moving - 1) if step > 0 else (moving - 1, moving)
            layer_ns = abs(self.ends[bounds[moving] + step] - self.ends[bounds[moving]])
            bounds[moving] += step
            load[homes[giver]] -= layer_ns
            load[homes[taker]] += layer_ns
            touched.add(homes[taker])
            if bounds[giver] == bounds[giver + 1] or self._stage_ns(bounds, giver) > self.limit:
                return
            fits = self._stage_ns(bounds, taker) <= self.limit
            if fits and all(load[device] < most for device in touched):
                yield bounds.copy(), load.copy()
            moving -= step
