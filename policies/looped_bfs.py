"""Looped BFS, breadth-first pipeline parallelism (arXiv 2211.05953)."""

from dataclasses import dataclass
from typing import ClassVar

from .op import Op
from .plan import Place, Plan, Recompute
from .stages import Stage, backward_kinds, cut_stages, looped_homes, ops, resident_plan, weave
from .work import Work


@dataclass(frozen=True)
class LoopedBFS:
    """Stage s runs on device s modulo devices; a chunk sees all microbatches before the next one.

    Backward takes the chunks in reverse, and the microbatches of each in the order of forward.

    chunks: stages a device.
    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    """

    name: ClassVar[str] = "looped-bfs"

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
        stages = cut_stages(self, work, homes, "F" + kinds)
        return resident_plan(
            self,
            (
                _order(stages[rank :: work.devices], kinds, work.microbatches)
                for rank in range(work.devices)
            ),
        )

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once: all of each chunk."""
        return microbatches * self.chunks


def _order(chunks: list[Stage], kinds: str, microbatches: int) -> tuple[Op, ...]:
    every = range(microbatches)
    forward = [op for chunk in chunks for op in ops("F", chunk, every)]
    for chunk in reversed(chunks):
        forward += weave(*(ops(kind, chunk, every) for kind in kinds))
    return tuple(forward)
