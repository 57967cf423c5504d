"""Run: one pass through a program, and who waits for what in it."""

import threading
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from ..policies.program import Program
from .streams import Clock, Mark

Before = list[list[int]]
"""By task, the tasks that it waits for, besides the one before it on its lane."""


def before_of(program: Program) -> Before:
    """What each task of a program waits for."""
    by_task = np.argsort(program.dep_after, kind="stable")
    before = program.dep_before[by_task].tolist()
    bounds = np.searchsorted(program.dep_after[by_task], np.arange(len(program) + 1)).tolist()
    return [before[first:stop] for first, stop in pairwise(bounds)]


class Run:
    """One pass through a program: which tasks are done, when they ran, and what went wrong.

    `ended` are marks on each task's stream, `begun_ns` and `issued_ns` when its thread began and
    ended to launch it, by the host's clock; `behind` what it came behind of the pass before.

    before: `before_of(program)`, where it is known.
    after: tasks of the pass before this one that some tasks wait for, too.
    """

    def __init__(
        self,
        program: Program,
        before: Before | None = None,
        after: "dict[int, list[tuple[Run, int]]] | None" = None,
    ) -> None:
        count = len(program)
        self.program = program
        self.after = after or {}
        self.ended: list[Mark | None] = [None] * count
        self.behind: dict[int, list[Mark]] = {}
        self.begun_ns, self.issued_ns = [0] * count, [0] * count
        self.failure: BaseException | None = None
        self._before = before_of(program) if before is None else before
        self._lock = threading.Lock()
        self._issued = [False] * count
        self._waiting: dict[int, list[threading.Lock]] = defaultdict(list)
        self._lanes: dict[int, threading.Event] = {}

    def before(self, task: int) -> list[int]:
        """The tasks that `task` waits for, besides the one before it on its lane."""
        return self._before[task]

    def issue(self, task: int) -> None:
        """A task has been issued, and has its marks."""
        with self._lock:
            self._issued[task] = True
            waiting = self._waiting.pop(task, ())
        for each in waiting:
            each.release()

    def wait_issued(self, task: int) -> None:
        """Block until a task has been issued, or the run has failed."""
        if self._issued[task]:
            return
        with self._lock:
            if self._issued[task] or self.failure is not None:
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting[task].append(mine)
        mine.acquire()

    def fail(self, error: BaseException) -> None:
        """Stop the run. The first error wins."""
        with self._lock:
            if self.failure is None:
                self.failure = error
            waiting = [each for waits in self._waiting.values() for each in waits]
            self._waiting.clear()
        for each in waiting:
            each.release()

    def times_ns(self, clock: Clock) -> tuple[list[int], list[int]]:
        """When each task started and ended, since the clock's start; all must be done.

        A task starts when its thread has begun to launch it, the one before it on its lane has
        ended, and all that it waits for. So one mark a task is enough, and marks are dear: Python's
        lock changes hands at each.
        """
        ends = [0 if mark is None else mark.time_ns(clock) for mark in self.ended]
        starts = [begun - clock.start_ns for begun in self.begun_ns]
        for lane in range(len(self.program.lanes)):
            free: list[int] = []
            for task in self.program.tasks_of(lane):
                waits = [ends[each] for each in self._before[task]]
                waits += [mark.time_ns(clock) for mark in self.behind.get(task, ())]
                # Clocks of devices differ by some microseconds.
                starts[task] = min(max([starts[task], *waits, *free]), ends[task])
                free = [ends[task]]
        return starts, ends

    def begin(self, lane: int) -> threading.Event:
        """A lane takes part; it sets the event that it gets when it has come to its end."""
        return self._lanes.setdefault(lane, threading.Event())

    def wait_for(self, tasks: Iterable[int]) -> None:
        """Block until these tasks are done, on their devices too, or the run has failed."""
        for task in tasks:
            self.wait_issued(task)
            mark = self.ended[task]
            if self.failure is not None:
                return
            if mark is not None:
                mark.block()

    def wait(self, lanes: Iterable[int] | None = None) -> None:
        """Block until these lanes (None: all) have come to their end, on their devices too."""
        for lane in list(self._lanes) if lanes is None else lanes:
            if lane in self._lanes:
                self._lanes[lane].wait()
                last = self.program.tasks_of(lane)[-1:]
                mark = self.ended[last[0]] if last else None
                if mark is not None:
                    mark.block()
