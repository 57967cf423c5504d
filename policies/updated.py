"""Updated: when and where each layer's new weights come to be."""

from dataclasses import dataclass

import numpy as np

from ..traces.timeline import Ints


@dataclass(frozen=True)
class Updated:
    """Shape (steps, layers): the task after which a layer's new weights can be used, or -1.

    They may come in several parts, as they are uploaded: `parts` tasks in a row, of which `task` is
    the last. `visit` is the visit whose copy of the weights is updated on the device, or -1.
    """

    task: Ints
    visit: Ints
    parts: Ints

    @classmethod
    def none(cls, steps: int, layers: int) -> "Updated":
        """As long as nothing is."""
        task, visit, parts = np.full((3, steps, layers), -1, dtype=np.int64)
        return cls(task, visit, np.ones_like(parts))
