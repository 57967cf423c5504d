"""GPipe (arXiv 1811.06965): all forwards, then all backwards."""

from dataclasses import dataclass
from typing import ClassVar

from .plan import Place, Plan, Recompute
from .stages import backward_kinds, cut_stages, looped_homes, ops, resident_plan, weave
from .work import Work


@dataclass(frozen=True)
class GPipe:
    """One stage a device; every microbatch forward, then every microbatch backward, in order.

    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    """

    name: ClassVar[str] = "gpipe"

    partition: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    optimizer_on: Place = "device"
    clip: bool = False
    recompute_layers: int | None = None

    def plan(self, work: Work, step: int) -> Plan:
        """The same plan for every step. Raises InputError when the partition does not fit."""
        kinds = backward_kinds(self.name, self.recompute, "B")
        homes = looped_homes(self.name, work.devices, chunks=1)
        stages = cut_stages(self, work, homes, "F" + kinds)
        every = range(work.microbatches)
        return resident_plan(
            self,
            (
                [*ops("F", stage, every), *weave(*(ops(kind, stage, every) for kind in kinds))]
                for stage in stages
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once: all."""
        return microbatches
