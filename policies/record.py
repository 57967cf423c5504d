"""record: a program and the times of its tasks become a Timeline. For simulated and real runs."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Timeline
from .memory import memory_curves
from .program import Program


def record(
    program: Program,
    start_ns: NDArray[np.int64],
    end_ns: NDArray[np.int64],
    name: str,
    source: Literal["simulated", "measured"],
) -> Timeline:
    """The timeline of `program`, whose task i ran from `start_ns[i]` to `end_ns[i]`."""
    return Timeline(
        name=name,
        source=source,
        devices=program.work.devices,
        microbatches=program.work.microbatches,
        steps=program.steps,
        microbatch_tokens=program.work.trace.microbatch_tokens,
        lanes=program.lanes,
        kind=program.kind,
        lane=program.lane,
        first=program.first,
        stop=program.stop,
        microbatch=program.microbatch,
        step=program.step,
        nbytes=program.nbytes,
        start_ns=start_ns,
        end_ns=end_ns,
        exposed_ns=exposed_ns(program, end_ns),
        memory=memory_curves(program, start_ns, end_ns),
    )


def exposed_ns(program: Program, end_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """How long each compute task's lane stood idle only because a transfer was not there yet.

    The time from when the lane was free, all else was there and the last transfer that the task
    waits for could have started, until that transfer's end.
    """
    count = len(program)
    moves = program.moves
    waits = moves[program.dep_before] & ~moves[program.dep_after]
    ready = np.zeros(count, dtype=np.int64)
    np.maximum.at(ready, program.dep_after, end_ns[program.dep_before])
    free = np.zeros(count, dtype=np.int64)
    before, after = program.neighbours()
    free[after] = end_ns[before]
    np.maximum.at(free, program.dep_after[~waits], end_ns[program.dep_before[~waits]])
    before, after = program.dep_before[waits], program.dep_after[waits]
    idle = end_ns[before] - np.maximum(free[after], ready[before])
    last = end_ns[before] == ready[after]
    exposed = np.zeros(count, dtype=np.int64)
    np.maximum.at(exposed, after[last], idle[last])
    return exposed
