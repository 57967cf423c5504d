"""RoundRobin: RoundPipe's schedule (arXiv 2604.27085). Stage visits rotate over the devices."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

from ..traces.errors import InputError
from .asymmetric import AsymmetricCut, finer, good_cuts, upload_ns, visit_ns
from .estimate import estimate, rough_makespan_ns
from .lowering import lower
from .op import Op
from .order import order_of
from .plan import Optimizer, Place, Plan, Recompute
from .table import OpTable
from .visits import Visits
from .work import Work, whole_number

CANDIDATES = 12
"""How many promising cuts are tried out."""

FINER = 4
"""Of how many of them finer ones are tried, where a step's ends cost updates and transfers."""

FITTED = 4
"""Of how many of them, quickest first, the memory is looked at."""

STEPS = 4
"""Steps over which the steady time of a stale step is taken."""


@dataclass(frozen=True)
class RoundRobin:
    """Weights are streamed from the host; the k-th stage visit runs on device k modulo devices.

    A step's microbatches go in rounds. Each round visits the forward stages, first layers first,
    then the backward stages, last layers first; a visit runs all microbatches of the round. The
    rotation goes on over rounds and steps. Where the forward cut stops short, the first backward
    stage runs the rest forward and backward in one visit.

    partition: layers per forward stage, first layers first. None: of the most promising cuts that
        fit the memory the one with the best step time.
    backward_partition: layers per backward stage, last layers first. None: likewise.
    round_size: the fewest microbatches of a round. None: as many as there are devices, or more
        where it takes more to hide a visit's upload behind its work.
    recompute: `early` or `late`; a visit elsewhere cannot keep what the forward saved.
    optimizer: `sync`, or `stale` by one step.
    activations: where the inputs of backward stages wait, `host` or `device`.
    """

    name: ClassVar[str] = "round-robin"

    partition: tuple[int, ...] | None = None
    backward_partition: tuple[int, ...] | None = None
    round_size: int | None = None
    recompute: Recompute = "early"
    optimizer: Optimizer = "sync"
    optimizer_on: Place = "host"
    activations: Place = "host"
    clip: bool = False

    def plan(self, work: Work, step: int) -> Plan:
        """The plan of step number `step`. Raises InputError where a cut does not fit the work."""
        if self.recompute == "none":
            raise InputError(
                "round-robin runs a layer's backward on another device than its forward, "
                "so it must recompute; use recompute early or late"
            )
        return self._plan(work, step, self.cut(work))

    def _plan(self, work: Work, step: int, cut: AsymmetricCut) -> Plan:
        rounds = self.rounds(work, cut)
        visits = _visits(cut, work.layers)
        turn = step * len(rounds) * len(visits)
        devices: list[list[Op]] = [[] for _ in range(work.devices)]
        for microbatches in rounds:
            for kinds, first, stop in visits:
                ops = devices[turn % work.devices]
                ops.extend(Op(kind, first, stop, m) for m in microbatches for kind in kinds)
                turn += 1
        return Plan(
            tuple(map(tuple, devices)),
            late_recompute=self.recompute == "late",
            weights="streamed",
            optimizer=self.optimizer,
            optimizer_on=self.optimizer_on,
            activations=self.activations,
            clip=self.clip,
        )

    def cut(self, work: Work) -> AsymmetricCut:
        """The cut in use: the given one, or the best. Raises InputError for one that is wrong."""
        if self.partition is None and self.backward_partition is None:
            return _best_cut(self, work)
        if self.partition is None or self.backward_partition is None:
            raise InputError(
                'round-robin: give both cuts, forward / backward, as in "7 7 7 7 / 1 3 3"'
            )
        cut = AsymmetricCut(self.partition, self.backward_partition)
        cut.check(work.layers)
        return cut

    def step_ns(self, work: Work, cut: AsymmetricCut) -> int:
        """About a step's time with this cut; of a stale step, the steady one.

        Transfers count where updates do, which both come behind a synchronous step's last op.
        """
        if self.optimizer == "sync" and work.machine.host.optimizer_params_per_s:
            return rough_makespan_ns(lower([self._plan(work, 0, cut)], work))
        steps = 1 if self.optimizer == "sync" else STEPS
        table = OpTable.of([self._plan(work, step, cut) for step in range(steps)], work)
        ends = order_of(table, Visits.of(table)).step_end_ns
        return int(ends[0] if steps == 1 else ends[-1] - ends[0]) // max(1, steps - 1)

    def fits(self, work: Work, cut: AsymmetricCut) -> bool:
        """Whether a step with this cut keeps within the devices' memory."""
        program = lower([self._plan(work, 0, cut)], work)
        return all(not curve.over_bytes for curve in estimate(program, self.name).memory[:-1])

    def rounds(self, work: Work, cut: AsymmetricCut) -> list[range]:
        """The microbatches of each round: as many rounds as `round_size` allows, evenly filled."""
        size = self.round_size
        if size is None:
            size = max(work.devices, _hiding_round(work, cut))
        whole_number("round-robin: round_size", size)
        count = max(1, work.microbatches // size)
        bounds = [work.microbatches * number // count for number in range(count + 1)]
        return [range(*pair) for pair in pairwise(bounds)]


@lru_cache(maxsize=64)
def _best_cut(policy: RoundRobin, work: Work) -> AsymmetricCut:
    """The quickest of the most promising cuts that fits the devices' memory, if one does."""
    # Beyond a few rounds more microbatches tell no more about a cut.
    enough = min(work.microbatches, max(4 * work.devices, policy.round_size or 0))
    short = replace(work, microbatches=enough)
    limit = min(device.memory_bytes for device in work.machine.devices)
    quickest = None
    # What the next visit brings is not known while packing: where it is too much, pack less.
    for share in (1.0, 0.8, 0.6, 0.45, 0.3):
        cuts = good_cuts(work, CANDIDATES, int(limit * share))
        if policy.optimizer == "sync" and work.machine.host.optimizer_params_per_s:
            cuts = list(
                dict.fromkeys([*cuts, *(each for cut in cuts[:FINER] for each in finer(cut))])
            )
        cuts.sort(key=lambda cut: policy.step_ns(short, cut))
        quickest = quickest or cuts[0]
        fitting = (cut for cut in cuts[:FITTED] if not limit or policy.fits(work, cut))
        if found := next(fitting, None):
            return found
    assert quickest is not None
    return quickest


def _visits(cut: AsymmetricCut, layers: int) -> list[tuple[str, int, int]]:
    """(kinds, first, stop) of each stage visit of a round, in order."""
    visits, first = [], 0
    for size in cut.forward:
        visits.append(("F", first, first + size))
        first += size
    stop = layers
    for size in cut.backward:
        visits.append(("FB" if stop - size >= first else "RB", stop - size, stop))
        stop -= size
    return visits


def _hiding_round(work: Work, cut: AsymmetricCut) -> int:
    """The fewest microbatches whose work on a visit takes as long as the visit's upload."""
    sizes = [
        -(-upload_ns(work, first, stop) // max(1, visit_ns(work, kinds, first, stop)))
        for kinds, first, stop in _visits(cut, work.layers)
    ]
    return min(max(sizes), work.microbatches)
