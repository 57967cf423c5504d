"""Lanes: a thread each, which runs the tasks of its lane in order as their dependencies allow."""

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

import numpy as np
import torch

from ..policies.program import Program
from ..traces.timeline import KIND_CODE
from .streams import Mark, Stream

Handler = Callable[[int], None]
"""Runs one task, given its number."""


class Run:
    """One pass through a program: which tasks are done, when they ran, and what went wrong.

    `after`: tasks of the pass before this one that some tasks wait for, too.
    """

    def __init__(
        self, program: Program, after: "dict[int, list[tuple[Run, int]]] | None" = None
    ) -> None:
        count = len(program)
        self.program = program
        self.after = after or {}
        self.started: list[Mark | None] = [None] * count
        self.ended: list[Mark | None] = [None] * count
        self.issued = [threading.Event() for _ in range(count)]
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._lanes: dict[int, threading.Event] = {}
        by_task = np.argsort(program.dep_after, kind="stable")
        self._before: list[int] = program.dep_before[by_task].tolist()
        starts = np.searchsorted(program.dep_after[by_task], np.arange(count + 1))
        self._starts: list[int] = starts.tolist()

    def before(self, task: int) -> list[int]:
        """The tasks that `task` waits for, besides the one before it on its lane."""
        return self._before[self._starts[task] : self._starts[task + 1]]

    def fail(self, error: BaseException) -> None:
        """Stop the run. The first error wins."""
        with self._lock:
            if self.failure is None:
                self.failure = error
        for event in self.issued:
            event.set()

    def begin(self, lane: int) -> threading.Event:
        """A lane takes part; it sets the event that it gets when it has come to its end."""
        return self._lanes.setdefault(lane, threading.Event())

    def wait_for(self, tasks: Iterable[int]) -> None:
        """Block until these tasks are done, on their devices too, or the run has failed."""
        for task in tasks:
            self.issued[task].wait()
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


AHEAD = 4
"""A lane's thread is at most this many tasks ahead of its stream, which bounds memory in use."""


class LaneThread:
    """Runs tasks in order on a stream, one run after another.

    `blocks`: the thread itself waits for what a task depends on, not only its stream. So do lanes
    that bring things to a device: they take memory that must have been freed by then.
    `threads`: how many torch's operations on the CPU use in this one; 0: as many as elsewhere.
    """

    def __init__(self, name: str, stream: Stream, blocks: bool = False, threads: int = 0) -> None:
        self.stream = stream
        self._blocks, self._threads = blocks, threads
        self._jobs: SimpleQueue[tuple[Run, int, Handler] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"roundel {name}", daemon=True)
        self._began = threading.Event()
        self._thread.start()
        self._began.wait()
        if threads:
            # The thread's number is also what threads to come get; theirs is this one's again.
            torch.set_num_threads(torch.get_num_threads())

    def submit(self, run: Run, lane: int, handler: Handler) -> None:
        """Run the tasks of a lane when all that was submitted before is done."""
        run.begin(lane)
        self._jobs.put((run, lane, handler))

    def close(self) -> None:
        """End the thread when all that was submitted is done."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        self._began.set()
        while (job := self._jobs.get()) is not None:
            run, lane, handler = job
            try:
                with self.stream.use():
                    self._run(run, run.program.tasks_of(lane), handler)
            except BaseException as error:
                run.fail(error)
            run.begin(lane).set()
            # What a run holds must not outlive it here, in a thread that waits for the next one.
            del job, run, handler

    def _run(self, run: Run, tasks: list[int], handler: Handler) -> None:
        for place, task in enumerate(tasks):
            blocks = self._blocks or _takes_freed_memory(run.program, task)
            for earlier, before in run.after.pop(task, ()):
                earlier.issued[before].wait()
                if earlier.failure is not None:
                    run.fail(earlier.failure)
                    return
                self._wait(earlier.ended[before], blocks)
            for before in run.before(task):
                run.issued[before].wait()
                if run.failure is not None:
                    return
                self._wait(run.ended[before], blocks)
            if run.failure is not None:
                return
            if place >= AHEAD:
                _reached(run.ended[tasks[place - AHEAD]]).block()
            run.started[task] = self.stream.record()
            handler(task)
            run.ended[task] = self.stream.record()
            run.issued[task].set()

    def _wait(self, mark: Mark | None, blocks: bool) -> None:
        if blocks:
            _reached(mark).block()
        else:
            self.stream.wait(_reached(mark))


def _takes_freed_memory(program: Program, task: int) -> bool:
    """Gradients of a layer that are sent to another device, where a visit made room for them."""
    return bool(program.kind[task] == KIND_CODE["send"] and program.microbatch[task] < 0)


def _reached(mark: Mark | None) -> Mark:
    assert mark is not None, "a task that is issued has its mark"
    return mark
