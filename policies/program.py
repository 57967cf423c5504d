"""Program: a plan lowered to tasks on in-order lanes, with their dependencies and buffers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints, Lane
from .plan import Plan
from .work import Work

HOST = -1
"""The host where a device is asked for; in `alloc`: held from the start."""

STATES = -1
"""The `part` of what goes down that a layer's states are, which were updated on a device."""

LABELS = (
    "weights",
    "gradients",
    "optimizer state",
    "saved activations",
    "boundary activations",
    "boundary gradients",
    "workspace",
)
LABEL_CODE = {label: code for code, label in enumerate(LABELS)}


@dataclass(frozen=True)
class Buffers:
    """Who holds memory, from when to when: one row a buffer. `layer` is the (first) layer it is of.

    A buffer lives in the memory `pool` (a device, or the number of devices for the host), from the
    start of task `alloc` (-1: from the beginning) to the end of the last task that uses it; one
    without uses is never freed. `use_buffer` and `use_task` are (buffer, task) pairs.
    """

    pool: Ints
    label: Ints
    layer: Ints
    nbytes: Ints
    alloc: Ints
    use_buffer: Ints
    use_task: Ints


@dataclass(frozen=True)
class Program:
    """Tasks in columns, one row a task.

    The tasks of lane `l` are `lane_tasks[lane_start[l]:lane_start[l + 1]]`, in order. A task
    starts when the one before it on its lane is done and every `before` of its dependency pairs
    is done. A task whose `source` and `target` differ moves `nbytes` from one memory to the other
    (a device, or -1 for the host) and takes as long as the links need; all others take
    `duration_ns`. `part` numbers the chunks of one upload, and of new weights
    on their way down that the next step waits for; a layer's states that were updated on a
    device go down as part `STATES`, behind its weights. `rules` is the plan without its ops;
    `steps` steps run back to back.
    """

    work: Work
    rules: Plan
    steps: int
    lanes: tuple[Lane, ...]
    kind: Ints
    lane: Ints
    first: Ints
    stop: Ints
    microbatch: Ints
    step: Ints
    part: Ints
    nbytes: Ints
    duration_ns: Ints
    source: Ints
    target: Ints
    lane_tasks: Ints
    lane_start: Ints
    dep_before: Ints
    dep_after: Ints
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def moves(self) -> NDArray[np.bool_]:
        """Which tasks bring something from one memory to another."""
        return np.asarray(self.source != self.target)

    def neighbours(self) -> tuple[Ints, Ints]:
        """(before, after) pairs of tasks that follow each other on a lane."""
        tasks = self.lane_tasks
        same = self.lane[tasks[1:]] == self.lane[tasks[:-1]]
        return tasks[:-1][same], tasks[1:][same]

    def edges(self) -> tuple[Ints, Ints]:
        """(before, after) pairs: the dependencies, and each lane's order."""
        before, after = self.neighbours()
        return np.concatenate((self.dep_before, before)), np.concatenate((self.dep_after, after))

    def tasks_of(self, lane: int) -> list[int]:
        """The tasks of a lane, in order."""
        first, stop = self.lane_start[lane : lane + 2]
        return [int(task) for task in self.lane_tasks[first:stop]]
