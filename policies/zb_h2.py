"""ZB-H2, zero bubble with up to twice the memory of 1F1B (arXiv 2401.10241, section 2.2)."""

from dataclasses import dataclass
from typing import ClassVar

from .plan import Place, Plan, Recompute
from .stages import backward_kinds, cut_stages, looped_homes, resident_plan
from .work import Work
from .zb_h1 import split_order


@dataclass(frozen=True)
class ZBH2:
    """ZB-H1 with more forwards first, so that no device waits between its first and last op.

    Device r of p runs 2 (p - r) - 1 forwards, then an I, the W of 2 r microbatches before, and a
    forward in turn. There is no wait when F, I and W take equally long and there are at least
    2 p - 1 microbatches.

    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    weight_share: the part of backward that W takes where the trace does not know it.
    """

    name: ClassVar[str] = "zb-h2"

    partition: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    optimizer_on: Place = "device"
    clip: bool = False
    weight_share: float | None = None
    recompute_layers: int | None = None

    def plan(self, work: Work, step: int) -> Plan:
        """The same plan for every step. Raises InputError when partition or trace do not fit."""
        kinds = backward_kinds(self.name, self.recompute, "I")
        homes = looped_homes(self.name, work.devices, chunks=1)
        stages = cut_stages(self, work, homes, f"F{kinds}W", spares_last=True)
        return resident_plan(
            self,
            (
                split_order(
                    stage,
                    kinds,
                    work.microbatches,
                    warm_up=2 * (work.devices - rank) - 1,
                    delay=2 * rank,
                )
                for rank, stage in enumerate(stages)
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once, until their W."""
        return min(microbatches, 2 * devices - 1)
