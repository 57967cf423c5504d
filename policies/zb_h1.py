"""ZB-H1, zero bubble with the memory of 1F1B (arXiv 2401.10241, section 2.1)."""

from dataclasses import dataclass
from typing import ClassVar

from .op import Op
from .plan import Place, Plan, Recompute
from .stages import Stage, backward_kinds, cut_stages, looped_homes, ops, resident_plan, weave
from .work import Work


@dataclass(frozen=True)
class ZBH1:
    """1F1B with backward split: `I` at once, `W` later, to fill the waits of the drain.

    Device r of p runs p - r forwards, then an I, the W of r microbatches before, and a forward in
    turn, so that no device holds more than p microbatches.

    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    weight_share: the part of backward that W takes where the trace does not know it.
    """

    name: ClassVar[str] = "zb-h1"

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
                split_order(stage, kinds, work.microbatches, work.devices - rank, delay=rank)
                for rank, stage in enumerate(stages)
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once, until their W."""
        return min(microbatches, devices)


def split_order(
    stage: Stage, kinds: str, microbatches: int, warm_up: int, delay: int
) -> tuple[Op, ...]:
    """`warm_up` forwards, then backward for the input, W of `delay` before, and forward in turn."""
    every = range(microbatches)
    forward, weights = ops("F", stage, every), ops("W", stage, every)
    inputs = [ops(kind, stage, every) for kind in kinds]
    return (*forward[:warm_up], *weave(*inputs, [*[None] * delay, *weights], forward[warm_up:]))
