"""LayerToLayer: L2L's schedule (arXiv 2002.05645). All devices work on the same layers."""

from dataclasses import dataclass
from typing import ClassVar

from .asymmetric import AsymmetricCut
from .op import Op
from .streamed import Streamed, visits_of
from .work import Work


@dataclass(frozen=True)
class LayerToLayer(Streamed):
    """Weights are streamed from the host; a device visits every stage with its own microbatches.

    A visit runs all of a device's microbatches before the next stage's weights are needed. Nothing
    passes between devices, so that no stage is to be balanced against another, and none waits for
    one; but each device uploads all weights and brings down gradients of all of them, which are
    summed on the host. See `Streamed` for the fields.
    """

    name: ClassVar[str] = "layer-to-layer"

    def ops(self, work: Work, step: int, cut: AsymmetricCut) -> list[list[Op]]:
        bounds = [work.microbatches * n // work.devices for n in range(work.devices + 1)]
        return [
            [
                Op(kind, first, stop, microbatch)
                for kinds, first, stop in visits_of(cut, work.layers)
                for microbatch in range(bounds[device], bounds[device + 1])
                for kind in kinds
            ]
            for device in range(work.devices)
        ]

    def enough(self, work: Work) -> int:
        return work.microbatches
