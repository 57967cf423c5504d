"""AsymmetricCut: forward and backward cut differently, and the best such cut for a machine."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from ..traces.errors import InputError
from ..traces.machine import HOST, Machine
from .work import Work

Fits = Callable[[int, int], bool]
"""Whether a visit to layers [first, stop) fits the memory."""


@dataclass(frozen=True)
class AsymmetricCut:
    """Layers per forward stage, first layers first, and per backward stage, last layers first."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.forward))} / {' '.join(map(str, self.backward))}".strip()

    def check(self, layers: int) -> None:
        """Raises InputError when the cut does not fit a model of `layers` layers."""
        if any(size < 1 for size in (*self.forward, *self.backward)) or not self.backward:
            raise InputError(f"partition {self}: every stage must have at least one layer")
        if sum(self.backward) != layers:
            raise InputError(
                f"partition {self}: the backward cut has {sum(self.backward)} layers, "
                f"the trace {layers} (head included)"
            )
        rest = layers - sum(self.forward)
        if rest not in (0, self.backward[0]):
            raise InputError(
                f"partition {self}: the forward cut must hold all {layers} layers, or leave out "
                f"just the {self.backward[0]} of the first backward stage; it leaves {rest}"
            )


def visit_ns(work: Work, kinds: str, first: int, stop: int) -> int:
    """Time of the ops of `kinds` on a range of layers, for one microbatch."""
    return _Times.of_work(work, kinds).of(first, stop)


def upload_ns(work: Work, first: int, stop: int) -> int:
    """Time to bring a range's weights to one device while all the others upload theirs."""
    nbytes = int(work.layer_bytes("param_bytes")[first:stop].sum())
    rate = shared_bytes_per_s(work.machine)
    return nbytes * 10**9 // rate if rate else 0


def shared_bytes_per_s(machine: Machine) -> int:
    """What one device has of the way to the host while all the others use theirs; 0: no limit."""
    if machine.hop_ns is not None or not machine.links:
        return 0
    names = {device.name for device in machine.devices}
    own = min((link.bytes_per_s for link in machine.links if names & {link.a, link.b}), default=0)
    shared = sum(link.bytes_per_s for link in machine.links if HOST in (link.a, link.b))
    return min((rate for rate in (own, shared // len(names)) if rate), default=0)


def good_cuts(work: Work, count: int, limit: int = 0) -> list[AsymmetricCut]:
    """The `count` most promising cuts for rotating visits, best first.

    With S visits a round in all, the slowest taking t, N devices and M microbatches, a step takes
    about (M S + N (N - 1)) t / N (arXiv 2604.27085). For every t that a slowest visit can have,
    the fewest visits are packed, then made as even as so many can be. Cuts with a visit that
    needs more than `limit` bytes (0: any) are left out, unless all have.
    """
    return _search(work, limit, count) or _search(work, 0, count)


def _search(work: Work, limit: int, count: int) -> list[AsymmetricCut]:
    times = {kinds: _Times.of_work(work, kinds) for kinds in ("F", "FB", "RB")}
    fits = _Fits(work, limit)
    packed = (_pack(work.layers, times, fits, bound) for bound in _bounds(times))
    shapes = {(len(cut.forward), len(cut.backward), cut.backward[0]): cut for cut in packed if cut}

    def step_time(cut: AsymmetricCut) -> int:
        visits = list(_visit_times(cut, times))
        fill = work.devices * (work.devices - 1)
        return (work.microbatches * len(visits) + fill) * max(visits)

    best = sorted(shapes.values(), key=step_time)[:count]
    return [_even(cut, times, fits) for cut in best]


def _even(cut: AsymmetricCut, times: dict[str, "_Times"], fits: "_Fits") -> AsymmetricCut:
    """A cut of as many stages, each as even as it gets, small stages first and last visited."""
    layers, bound = sum(cut.forward), max(_visit_times(cut, times))
    forward = _evenest(layers, len(cut.forward), times["F"], fits.forward, bound)
    backward = _evenest(layers, len(cut.backward) - 1, times["RB"], fits.backward, bound)
    return AsymmetricCut(forward, (cut.backward[0], *reversed(backward)))


def _evenest(layers: int, stages: int, times: "_Times", fits: Fits, bound: int) -> tuple[int, ...]:
    """Sizes of `stages` stages with the least sum of squared times, none slower than `bound`."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(stages):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for first, (cost, sizes) in best.items():
            for stop in range(first + 1, layers + 1):
                time = times.of(first, stop)
                if time > bound or not fits(first, stop):
                    break
                if stop not in longer or cost + time * time < longer[stop][0]:
                    longer[stop] = (cost + time * time, (*sizes, stop - first))
        best = longer
    return best[layers][1]


@dataclass(frozen=True)
class _Times:
    """Times of the layers before each: their sum, and what a visit is spared that ends there."""

    ends: list[int]
    spared: list[int]

    @classmethod
    def of_work(cls, work: Work, kinds: str) -> "_Times":
        spared = work.spared_ns if "R" in kinds else [0] * work.layers
        return cls(list(accumulate(work.together_ns(kinds), initial=0)), [0, *spared])

    def of(self, first: int, stop: int) -> int:
        """Of a visit to layers [first, stop)."""
        return self.ends[stop] - self.ends[first] - self.spared[stop]


def _bounds(times: dict[str, _Times]) -> list[int]:
    """Every time that a slowest visit can have."""
    return sorted(
        {
            each.of(first, stop)
            for each in times.values()
            for first in range(len(each.ends))
            for stop in range(first + 1, len(each.ends))
        }
    )


def _pack(layers: int, times: dict[str, _Times], fits: "_Fits", bound: int) -> AsymmetricCut | None:
    """The fewest stages with no visit over `bound`, or None when a layer alone is over it."""
    head = _longest(layers, times["FB"], fits.backward, bound)
    if not head:
        return None
    forward = _pack_forward(layers - head, times["F"].ends, fits.forward, bound)
    backward = _pack_backward(layers - head, times["RB"], fits.backward, bound)
    if forward is None or backward is None:
        return None
    return AsymmetricCut(forward, (head, *backward))


def _pack_backward(stop: int, times: _Times, fits: Fits, bound: int) -> tuple[int, ...] | None:
    sizes = []
    while stop:
        sizes.append(_longest(stop, times, fits, bound))
        if not sizes[-1]:
            return None
        stop -= sizes[-1]
    return tuple(sizes)


def _longest(stop: int, times: _Times, fits: Fits, bound: int) -> int:
    """The most layers before `stop` that one visit can take."""
    ends = times.ends
    first = bisect_left(ends, ends[stop] - times.spared[stop] - bound, 0, stop)
    if first < stop and not fits(first, stop):
        # More layers never need less.
        first += bisect_left(range(first, stop), True, key=lambda each: fits(each, stop))
    return stop - first


def _pack_forward(layers: int, prefix: list[int], fits: Fits, bound: int) -> tuple[int, ...] | None:
    sizes, first = [], 0
    while first < layers:
        stop = bisect_right(prefix, prefix[first] + bound, first, layers + 1) - 1
        if stop > first and not fits(first, stop):
            more = range(first + 1, stop)
            stop = first + bisect_left(more, True, key=lambda each: not fits(first, each))
        if stop == first:
            return None
        sizes.append(stop - first)
        first = stop
    return tuple(sizes)


def _visit_times(cut: AsymmetricCut, times: dict[str, _Times]) -> Iterator[int]:
    first = 0
    for size in cut.forward:
        yield times["F"].of(first, first + size)
        first += size
    stop = len(times["F"].ends) - 1
    for number, size in enumerate(cut.backward):
        yield times["RB" if number else "FB"].of(stop - size, stop)
        stop -= size


class _Fits:
    """Whether a visit fits a device: its weights and the next visit's, and what its work holds."""

    def __init__(self, work: Work, limit: int) -> None:
        fields = ("param_bytes", "grad_bytes", "saved_bytes", "output_bytes")
        self._sums = {field: _sums(work, field) for field in fields}
        self._workspace = work.layer_bytes("workspace_bytes").tolist()
        self._limit = limit
        self._boundary = int(work.layer_bytes("output_bytes").max()) * _BOUNDARIES

    def forward(self, first: int, stop: int) -> bool:
        return self._within(lambda field: 2 * field("param_bytes"), first, stop)

    def backward(self, first: int, stop: int) -> bool:
        return self._within(
            lambda field: (
                2 * field("param_bytes")
                + field("grad_bytes")
                + field("saved_bytes")
                + field("output_bytes")
            ),
            first,
            stop,
        )

    def _within(self, need: Callable[[Callable[[str], int]], int], first: int, stop: int) -> bool:
        if not self._limit:
            return True
        total = need(lambda field: self._sums[field][stop] - self._sums[field][first])
        return bool(total + max(self._workspace[first:stop]) + self._boundary <= self._limit)


_BOUNDARIES = 8
"""Boundary tensors that may be on a device beside a visit's own: received, sent and fetched."""


def _sums(work: Work, field: str) -> list[int]:
    return list(accumulate(work.layer_bytes(field).tolist(), initial=0))
