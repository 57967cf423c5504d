"""Updated: when and where each layer's new weights come to be."""

from dataclasses import dataclass

from ..traces.timeline import Ints


@dataclass(frozen=True)
class Updated:
    """Shape (steps, layers): the task after which a layer's new weights can be used, or -1.

    `visit` is the visit whose copy of the weights is updated on the device, or -1.
    """

    task: Ints
    visit: Ints
