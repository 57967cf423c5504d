"""AsymmetricCut: forward and backward cut differently, and the best such cut for a machine."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ..traces.errors import InputError
from ..traces.machine import HOST
from .work import Work


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
    return sum(sum(work.layer_ns(kind)[first:stop]) for kind in kinds)


def upload_ns(work: Work, first: int, stop: int) -> int:
    """Time to bring a range's weights to one device while all the others upload theirs."""
    nbytes = int(work.layer_bytes("param_bytes")[first:stop].sum())
    machine = work.machine
    if machine.hop_ns is not None or not machine.links:
        return 0
    names = {device.name for device in machine.devices}
    own = min((link.bytes_per_s for link in machine.links if names & {link.a, link.b}), default=0)
    shared = sum(link.bytes_per_s for link in machine.links if HOST in (link.a, link.b))
    rate = min(rate for rate in (own, shared // len(names)) if rate) if own or shared else 0
    return nbytes * 10**9 // rate if rate else 0


@lru_cache(maxsize=64)
def best_cut(work: Work) -> AsymmetricCut:
    """The cut that minimises the step time of rotating visits, within the devices' memory.

    With S visits a round in all, the slowest taking t, N devices and M microbatches, a step takes
    (M S + N (N - 1)) t / N (arXiv 2604.27085, section on the schedule; M S t / N when stale steps
    overlap). Exact over all t: for each possible slowest visit the fewest stages are packed, and
    a cut that does not fit the memory is not considered unless none does.
    """
    found = _search(work, _memory_limit(work)) or _search(work, 0)
    assert found is not None, "without a limit every layer fits in a stage of its own"
    return found


def _search(work: Work, limit: int) -> AsymmetricCut | None:
    times = {kinds: _prefix(work, kinds) for kinds in ("F", "FB", "RB")}
    fits = _Fits(work, limit)
    best: tuple[int, AsymmetricCut] | None = None
    for bound in _bounds(times):
        cut = _pack(work.layers, times, fits, bound)
        if cut is None:
            continue
        visits = len(cut.forward) + len(cut.backward)
        devices = work.devices
        score = (work.microbatches * visits + devices * (devices - 1)) * _slowest(cut, times)
        if best is None or score < best[0]:
            best = (score, cut)
    return best[1] if best else None


def _prefix(work: Work, kinds: str) -> list[int]:
    layers = zip(*(work.layer_ns(kind) for kind in kinds), strict=True)
    return list(accumulate(map(sum, layers), initial=0))


def _bounds(times: dict[str, list[int]]) -> list[int]:
    """Every time that a slowest visit can have."""
    return sorted(
        {
            prefix[stop] - prefix[first]
            for prefix in times.values()
            for first in range(len(prefix))
            for stop in range(first + 1, len(prefix))
        }
    )


def _pack(
    layers: int, times: dict[str, list[int]], fits: "_Fits", bound: int
) -> AsymmetricCut | None:
    """The fewest stages with no visit over `bound`, or None when a layer alone is over it."""
    backward = []
    stop = layers
    while stop:
        kinds = "FB" if not backward else "RB"
        prefix = times[kinds]
        first = stop
        while first and prefix[stop] - prefix[first - 1] <= bound and fits.backward(first - 1, stop):
            first -= 1
        if first == stop:
            return None
        backward.append(stop - first)
        stop = first
    forward = _pack_forward(layers - backward[0], times["F"], fits, bound)
    return None if forward is None else AsymmetricCut(forward, tuple(backward))


def _pack_forward(
    layers: int, prefix: list[int], fits: "_Fits", bound: int
) -> tuple[int, ...] | None:
    forward, first = [], 0
    while first < layers:
        stop = min(layers, bisect_right(prefix, prefix[first] + bound) - 1)
        while stop > first and not fits.forward(first, stop):
            stop -= 1
        if stop == first:
            return None
        forward.append(stop - first)
        first = stop
    return tuple(forward)


def _slowest(cut: AsymmetricCut, times: dict[str, list[int]]) -> int:
    return max(_visit_times(cut, times))


def _visit_times(cut: AsymmetricCut, times: dict[str, list[int]]) -> Iterator[int]:
    first = 0
    for size in cut.forward:
        yield times["F"][first + size] - times["F"][first]
        first += size
    stop = len(times["F"]) - 1
    for number, size in enumerate(cut.backward):
        prefix = times["RB" if number else "FB"]
        yield prefix[stop] - prefix[stop - size]
        stop -= size


def _memory_limit(work: Work) -> int:
    return min(device.memory_bytes for device in work.machine.devices)


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
            lambda field: 2 * field("param_bytes")
            + field("grad_bytes")
            + field("saved_bytes")
            + field("output_bytes"),
            first,
            stop,
        )

    def _within(self, need: Callable[[Callable[[str], int]], int], first: int, stop: int) -> bool:
        if not self._limit:
            return True
        total = need(lambda field: self._sums[field][stop] - self._sums[field][first])
        return total + max(self._workspace[first:stop]) + self._boundary <= self._limit


_BOUNDARIES = 8
"""Boundary tensors that may be on a device beside a visit's own: received, sent and fetched."""


def _sums(work: Work, field: str) -> list[int]:
    return list(accumulate(work.layer_bytes(field).tolist(), initial=0))
