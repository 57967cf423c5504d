"""Interleaved 1F1B (arXiv 2104.04473, Megatron-LM): 1F1B over several chunks a device."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from .op import Op
from .plan import Place, Plan, Recompute
from .stages import Stage, backward_kinds, cut_stages, looped_homes, ops, resident_plan, weave
from .work import Work


@dataclass(frozen=True)
class Interleaved1F1B:
    """Stage s runs on device s modulo devices; rounds of microbatches visit chunk after chunk.

    Where the devices do not divide the microbatches, the rounds are longer, as even as they can be
    (a shorter last round can deadlock). With fewer microbatches than devices there is one round.

    chunks: stages a device.
    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    """

    name: ClassVar[str] = "interleaved-1f1b"

    chunks: int = 2
    partition: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    optimizer_on: Place = "device"
    clip: bool = False
    recompute_layers: int | None = None

    def plan(self, work: Work, step: int) -> Plan:
        """The same plan for every step. Raises InputError when the partition does not fit."""
        kinds = backward_kinds(self.name, self.recompute, "B")
        homes = looped_homes(self.name, work.devices, self.chunks)
        stages = cut_stages(self, work, homes, "F" + kinds, spares_last=True)
        rounds = _rounds(work.devices, work.microbatches)
        return resident_plan(
            self,
            (
                _order(
                    stages[rank :: work.devices],
                    kinds,
                    rounds,
                    self._warm_up(work.devices, work.microbatches, rank),
                )
                for rank in range(work.devices)
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once, over its chunks."""
        warm_up = self._warm_up(devices, microbatches, rank)
        return min(microbatches * self.chunks, warm_up + 1)

    def _warm_up(self, devices: int, microbatches: int, rank: int) -> int:
        """Forwards before the first forward-backward pair."""
        longest = max(map(len, _rounds(devices, microbatches)))
        return 2 * (devices - rank - 1) + (self.chunks - 1) * longest


def _rounds(devices: int, microbatches: int) -> list[range]:
    count = max(1, microbatches // devices)
    bounds = [microbatches * number // count for number in range(count + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def _order(chunks: list[Stage], kinds: str, rounds: list[range], warm_up: int) -> tuple[Op, ...]:
    forward = _run("F", chunks, rounds)
    backward = [_run(kind, chunks[::-1], rounds) for kind in kinds]
    return (*forward[:warm_up], *weave(forward[warm_up:], *backward))


def _run(kind: str, chunks: list[Stage], rounds: list[range]) -> list[Op]:
    return [op for group in rounds for chunk in chunks for op in ops(kind, chunk, group)]
