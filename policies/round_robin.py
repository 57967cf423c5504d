"""RoundRobin: RoundPipe's schedule (arXiv 2604.27085). Stage visits rotate over the devices."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .asymmetric import AsymmetricCut, upload_ns, visit_ns
from .op import Op
from .streamed import Streamed, visits_of
from .work import Work, whole_number


@dataclass(frozen=True)
class RoundRobin(Streamed):
    """Weights are streamed from the host; the k-th stage visit runs on device k modulo devices.

    A step's microbatches go in rounds. Each round visits the forward stages, first layers first,
    then the backward stages, last layers first; a visit runs all microbatches of the round. The
    rotation goes on over rounds and steps. See `Streamed` for the other fields.

    round_size: the fewest microbatches of a round. None: as many as there are devices, or more
        where it takes more to hide a visit's upload behind its work.
    """

    name: ClassVar[str] = "round-robin"

    round_size: int | None = None

    def ops(self, work: Work, step: int, cut: AsymmetricCut) -> list[list[Op]]:
        rounds = self.rounds(work, cut)
        visits = visits_of(cut, work.layers)
        turn = step * len(rounds) * len(visits)
        devices: list[list[Op]] = [[] for _ in range(work.devices)]
        for microbatches in rounds:
            for kinds, first, stop in visits:
                ops = devices[turn % work.devices]
                ops.extend(Op(kind, first, stop, m) for m in microbatches for kind in kinds)
                turn += 1
        return devices

    def enough(self, work: Work) -> int:
        return max(4 * work.devices, self.round_size or 0)

    def rounds(self, work: Work, cut: AsymmetricCut) -> list[range]:
        """The microbatches of each round: as many rounds as `round_size` allows, evenly filled."""
        size = self.round_size
        if size is None:
            size = max(work.devices, _hiding_round(work, cut))
        whole_number("round-robin: round_size", size)
        count = max(1, work.microbatches // size)
        bounds = [work.microbatches * number // count for number in range(count + 1)]
        return [range(*pair) for pair in pairwise(bounds)]


def _hiding_round(work: Work, cut: AsymmetricCut) -> int:
    """The fewest microbatches whose work on a visit takes as long as the visit's upload."""
    sizes = [
        -(-upload_ns(work, first, stop) // max(1, visit_ns(work, kinds, first, stop)))
        for kinds, first, stop in visits_of(cut, work.layers)
    ]
    return min(max(sizes), work.microbatches)
