"""Lanes: a thread each, which runs the tasks of its lane in order as their dependencies allow."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from ..policies.program import Program
from ..traces.timeline import KIND_CODE
from .run import Run
from .streams import Mark, Stream

Handler = Callable[[int], None]
"""Runs one task, given its number."""


AHEAD = 4
"""A lane's thread is at most this many tasks ahead of its stream, which bounds memory in use."""


class LaneThread:
    """Runs tasks in order on a stream, one run after another.

    `blocks`: the thread itself waits for what a task depends on, not only its stream. So do lanes
    that bring things to a device: they take memory that must have been freed by then.
    `threads`: how many torch's operations on the CPU use in this one; 0: as many as elsewhere.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        blocks: bool = False,
        threads: int = 0,
    ) -> None:
        self.stream = stream
        self._blocks, self._threads = blocks, threads
        self._last: Mark | None = None  # The end of the run before this one.
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
            # Asked first: at its first operation a thread that never was takes the default.
            torch.get_num_threads()
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
            marks = self._issued(run, task)
            if run.failure is not None:
                return
            if self._blocks or _takes_freed_memory(run.program, task):
                for mark in marks:
                    mark.block()
                marks = []
            if place >= AHEAD:
                _reached(run.ended[tasks[place - AHEAD]]).block()
            for mark in marks:
                self.stream.wait(mark)
            run.begun_ns[task] = time.perf_counter_ns()
            handler(task)
            run.issued_ns[task] = time.perf_counter_ns()
            run.ended[task] = self.stream.record()
            run.issue(task)
        self._last = run.ended[tasks[-1]] if tasks else self._last

    def _issued(self, run: Run, task: int) -> list[Mark]:
        """The ends of what a task waits for, when all has been issued or the run has failed."""
        earlier = run.after.pop(task, ())
        waits = [*earlier, *((run, before) for before in run.before(task))]
        for each, before in waits:
            each.wait_issued(before)
            if each.failure is not None:
                run.fail(each.failure)
                return []
        marks = [_reached(each.ended[before]) for each, before in waits]
        behind = marks[: len(earlier)]
        if self._last is not None:
            behind.append(self._last)
            self._last = None
        if behind:
            run.behind[task] = behind
        return marks


def _takes_freed_memory(program: Program, task: int) -> bool:
    """Gradients of a layer that are sent to another device, where a visit made room for them."""
    return bool(program.kind[task] == KIND_CODE["send"] and program.microbatch[task] < 0)


def _reached(mark: Mark | None) -> Mark:
    assert mark is not None, "a task that is issued has its mark"
    return mark
