"""1F1B, also PipeDream-Flush (arXiv 2006.09503): a backward as soon as there can be one."""

from dataclasses import dataclass
from typing import ClassVar

from .op import Op
from .plan import Place, Plan, Recompute
from .stages import Stage, backward_kinds, cut_stages, looped_homes, ops, resident_plan, weave
from .work import Work


@dataclass(frozen=True)
class OneFOneB:
    """One stage a device; device r of p runs p - r forwards, then a backward and a forward in turn.

    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    """

    name: ClassVar[str] = "1f1b"

    partition: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    optimizer_on: Place = "device"
    clip: bool = False
    recompute_layers: int | None = None

    def plan(self, work: Work, step: int) -> Plan:
        """The same plan for every step. Raises InputError when the partition does not fit."""
        kinds = backward_kinds(self.name, self.recompute, "B")
        homes = looped_homes(self.name, work.devices, chunks=1)
        stages = cut_stages(self, work, homes, "F" + kinds, spares_last=True)
        return resident_plan(
            self,
            (
                _order(stage, kinds, work.microbatches, warm_up=work.devices - rank - 1)
                for rank, stage in enumerate(stages)
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once."""
        return min(microbatches, devices - rank)


def _order(stage: Stage, kinds: str, microbatches: int, warm_up: int) -> tuple[Op, ...]:
    every = range(microbatches)
    forward = ops("F", stage, every)
    backward = [ops(kind, stage, every) for kind in kinds]
    return (*forward[:warm_up], *weave(forward[warm_up:], *backward))
