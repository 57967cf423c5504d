"""Streamed: what policies share whose weights come from the host for every visit."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice, pairwise, takewhile
from typing import ClassVar

from ..traces.errors import InputError
from .asymmetric import AsymmetricCut, good_cuts, upload_ns
from .estimate import estimated_memory, rough_makespan_ns
from .lowering import lower
from .near_cuts import backward_in_ones, descended, finer
from .op import Op
from .order import order_of
from .plan import Optimizer, Place, Plan, Recompute
from .table import OpTable
from .visits import Visits
from .work import Work

CANDIDATES = 12
"""How many promising cuts are tried out."""

FINER = 4
"""Of how many of them finer ones are tried, where a step's ends cost updates and transfers."""

FITTED = 4
"""Of how many of them, quickest first, the memory is looked at."""

SPARE, LEAST_SPARE = 0.3, 0.05
"""Of the memory is left free by cuts that take more of it to be quicker; where it is tight, little.

A plan counts what it holds; torch's allocator took 1.4 times that on two H200s, for it has memory
for each stream. Nearer to the limit it gives some back to take it anew, and the GPU stands still.
"""

PIECES = 8
"""In how many pieces at most a step's first forward on a device goes."""

STEPS = 4
"""Steps over which the steady time of a stale step is taken."""

Visit = tuple[str, int, int]
"""(kinds, first layer, stop) of a visit to a range of layers."""


@dataclass(frozen=True)
class Streamed(ABC):
    """Forward and backward are cut differently; a visit has its own copy of the weights.

    partition: layers per forward stage, first layers first. None: of the most promising cuts that
        fit the memory the one with the best step time. Where it stops short, the first backward
        stage runs the rest forward and backward in one visit.
    backward_partition: layers per backward stage, last layers first. None: likewise.
    recompute: `early` or `late`; a visit cannot keep what an earlier one saved. (`needed` is
        `early` here.)
    optimizer: `sync`, or `stale` by one step.
    activations: where the inputs of backward stages wait, `host` or `device`.
    """

    name: ClassVar[str]

    partition: tuple[int, ...] | None = None
    backward_partition: tuple[int, ...] | None = None
    recompute: Recompute = "early"
    optimizer: Optimizer = "sync"
    optimizer_on: Place = "host"
    activations: Place = "host"
    clip: bool = False

    @abstractmethod
    def ops(self, work: Work, step: int, cut: AsymmetricCut) -> list[list[Op]]:
        """The ops of each device, in order, in step number `step`."""

    def plan(self, work: Work, step: int) -> Plan:
        """The plan of step number `step`. Raises InputError where a cut does not fit the work."""
        if self.recompute == "none":
            raise InputError(
                f"{self.name} runs a layer's backward in another visit than its forward, "
                "so it must recompute; use recompute early or late"
            )
        return self.plan_with(work, step, self.cut(work))

    def plan_with(self, work: Work, step: int, cut: AsymmetricCut) -> Plan:
        """The plan with a cut that is known to fit the work.

        Where uploads take time a synchronous step's first forward goes in pieces, which start as
        their layers come up: nothing hides these, as a visit hides what the next one needs.
        """
        devices = self.ops(work, step, cut)
        if self.optimizer == "sync" and upload_ns(work, 0, work.layers):
            devices = list(map(_begun_in_pieces, devices))
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
                f'{self.name}: give both cuts, forward / backward, as in "7 7 7 7 / 1 3 3"'
            )
        cut = AsymmetricCut(self.partition, self.backward_partition)
        cut.check(work.layers)
        return cut

    def ends_cost(self, work: Work) -> bool:
        """Whether a step's time depends on what is left to move and to update at its ends."""
        machine = work.machine
        rates = [machine.host.optimizer_params_per_s]
        if self.optimizer_on == "device":
            rates = [device.optimizer_params_per_s for device in machine.devices]
        return self.optimizer == "sync" and max(rates) > 0

    def step_ns(self, work: Work, cut: AsymmetricCut) -> int:
        """About a step's time with this cut; of a stale step, the steady one.

        Transfers count where updates do, which both come behind a synchronous step's last op.
        """
        if self.ends_cost(work):
            return rough_makespan_ns(lower([self.plan_with(work, 0, cut)], work))
        steps = 1 if self.optimizer == "sync" else STEPS
        table = OpTable.of([self.plan_with(work, step, cut) for step in range(steps)], work)
        ends = order_of(table, Visits.of(table)).step_end_ns
        return int(ends[0] if steps == 1 else ends[-1] - ends[0]) // max(1, steps - 1)

    def fits(self, work: Work, cut: AsymmetricCut, share: float = 1.0) -> bool:
        """Whether a step with this cut keeps within this share of the devices' memory.

        Where some of a step goes on beside the next one, two.
        """
        plans = [self.plan_with(work, 0, cut)]
        if plans[0].outlasts_step:
            plans.append(self.plan_with(work, 1, cut))
        program = lower(plans, work)
        curves = estimated_memory(program, self.name)[:-1]
        return all(
            not curve.limit_bytes or curve.peak_bytes <= share * curve.limit_bytes
            for curve in curves
        )

    def enough(self, work: Work) -> int:
        """So many microbatches that more tell no more about a cut."""
        return 4 * work.devices


@lru_cache(maxsize=64)
def _best_cut(policy: Streamed, work: Work) -> AsymmetricCut:
    """The quickest of the most promising cuts that fits the devices' memory.

    Where a step's ends cost, it goes on from there to the best that small changes lead to. Where
    none fits, one layer a visit: nothing needs less, and what it lacks is what is lacking.
    """
    short = replace(work, microbatches=min(work.microbatches, policy.enough(work)))

    @cache
    def step_ns(cut: AsymmetricCut) -> int:
        return policy.step_ns(short, cut)

    limits = (device.memory_bytes for device in work.machine.devices)
    limit = min(filter(None, limits), default=0)
    # What the next visit brings is not known while packing: where it is too much, pack less.
    for share in (1.0, 0.8, 0.6, 0.45, 0.3):
        promising = good_cuts(work, CANDIDATES, int(limit * share))
        cuts = promising
        if policy.ends_cost(work):
            more = (each for cut in promising[:FINER] for each in finer(cut))
            cuts = list(dict.fromkeys([*promising, *more]))
        cuts = sorted(cuts, key=step_ns)
        fitting = (cut for cut in cuts[:FITTED] if not limit or policy.fits(work, cut))
        found = next(fitting, None)
        if found and policy.ends_cost(work):
            leaves_room = _leaves_room(policy, work, found)
            # Small changes need not lead to them.
            others = sorted(map(backward_in_ones, promising[:FINER]), key=step_ns)
            starts = dict.fromkeys([found, *islice(filter(leaves_room, others), 1)])
            return min((descended(each, step_ns, leaves_room) for each in starts), key=step_ns)
        if found:
            return found
    return AsymmetricCut((1,) * (work.layers - 1), (1,) * work.layers)


def _leaves_room(
    policy: Streamed, work: Work, found: AsymmetricCut
) -> Callable[[AsymmetricCut], bool]:
    """Whether a cut leaves free what it should, where the one that was found first does."""
    spare = SPARE if policy.fits(work, found, 1 - SPARE) else LEAST_SPARE
    return lambda cut: policy.fits(work, cut, 1 - spare)


def _begun_in_pieces(ops: list[Op]) -> list[Op]:
    """A device's ops, the first one in pieces where its visit is one of several forwards."""
    if not ops:
        return ops
    kind, first, stop, microbatch = ops[0]
    visit = list(takewhile(lambda op: (op.first, op.stop) == (first, stop), ops))
    if len(visit) == 1 or any(op.kind != "F" for op in visit):
        return ops
    count = min(PIECES, stop - first)
    bounds = [first + (stop - first) * number // count for number in range(count + 1)]
    return [*(Op(kind, *pair, microbatch) for pair in pairwise(bounds)), *ops[1:]]


def visits_of(cut: AsymmetricCut, layers: int) -> list[Visit]:
    """The stage visits of a round, in order."""
    visits, first = [], 0
    for size in cut.forward:
        visits.append(("F", first, first + size))
        first += size
    stop = layers
    for size in cut.backward:
        visits.append(("FB" if stop - size >= first else "RB", stop - size, stop))
        stop -= size
    return visits
