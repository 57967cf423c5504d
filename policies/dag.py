"""Dag: tasks that wait for one another, and when each of them can run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints


def fast(array: NDArray[Any]) -> "memoryview[int]":
    """The same memory with single elements read and written much faster than numpy does."""
    return memoryview(array)  # type: ignore[arg-type]


class Dag:
    """Tasks 0..n-1, `before[i]` to be done when `after[i]` starts.

    `start_ns` and `end_ns` hold what is known so far; `order` lists the tasks in the order in
    which their ends became known, which is a topological order.
    `duration_ns` is taken over, not copied.
    A task in `held` is not run by `settle` but returned, for the caller to `release`.
    """

    def __init__(
        self,
        before: Ints,
        after: Ints,
        duration_ns: NDArray[np.int64],
        held: NDArray[np.bool_] | None = None,
    ) -> None:
        count = len(duration_ns)
        self.start_ns = np.zeros(count, dtype=np.int64)
        self.end_ns = np.zeros(count, dtype=np.int64)
        self.order = np.empty(count, dtype=np.int32)
        self.done = 0
        self._duration = duration_ns
        self._held = np.zeros(count, dtype=np.bool_) if held is None else held
        self._missing = np.bincount(after, minlength=count).astype(np.int32)
        self._first = np.zeros(count + 1, dtype=np.int32)
        np.cumsum(np.bincount(before, minlength=count), out=self._first[1:])
        self._next = after[np.argsort(before, kind="stable")].astype(np.int32)

    def run_roots(self) -> list[int]:
        """Settle the tasks that wait for nothing; returns the held ones that became ready."""
        roots = np.flatnonzero(self._missing == 0)
        held = self._held[roots]
        return [*roots[held].tolist(), *self.settle(roots[~held].tolist()[::-1])]

    def release(self, task: int, end_ns: int) -> list[int]:
        """The held `task` ended at `end_ns`; returns the held ones that thereby became ready."""
        self._duration[task] = end_ns - self.start_ns[task]
        return self.settle([task])

    def settle(self, ready: list[int]) -> list[int]:
        """Run the `ready` tasks and all that can follow; returns the held ones now ready."""
        start, end = fast(self.start_ns), fast(self.end_ns)
        duration, missing = fast(self._duration), fast(self._missing)
        first, following = fast(self._first), fast(self._next)
        held, order = fast(self._held), fast(self.order)
        waiting: list[int] = []
        done = self.done
        while ready:
            task = ready.pop()
            order[done] = task
            done += 1
            at = start[task] + duration[task]
            end[task] = at
            for index in range(first[task], first[task + 1]):
                successor = following[index]
                if start[successor] < at:
                    start[successor] = at
                left = missing[successor] - 1
                missing[successor] = left
                if not left:
                    (waiting if held[successor] else ready).append(successor)
        self.done = done
        return waiting

    def blocked(self) -> Ints:
        """Tasks that never became ready: what they wait for waits for them."""
        stuck = np.ones(len(self.start_ns), dtype=np.bool_)
        stuck[self.order[: self.done]] = False
        return np.flatnonzero(stuck)

    def rank(self) -> NDArray[np.int64]:
        """Position of each task when sorted by end, ties in topological order."""
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.arange(len(self.order))
        rank = np.empty_like(place)
        rank[np.lexsort((place, self.end_ns))] = np.arange(len(place))
        return rank
