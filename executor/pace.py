"""Pace: how far a thread that launches kernels may be ahead of its GPU."""

from collections import deque
from collections.abc import Callable

import torch

from .streams import Mark, mark_now

AHEAD = 30
"""Forwards of a layer that may be under way on a device when one more is launched.

CUDA's queue of a stream holds about a thousand kernels; so many are about thirty of a decoder's.
Whoever launches into a full one waits there, and to mark the end of a task with Python's lock.
"""

MARKED = 5
"""After so many there is a mark: at each, Python's lock changes hands."""

BACKWARD = 3
"""A layer's backward has about so many times its forward's kernels."""


class Pace:
    """Holds back whoever launches on a device, so that its queue is never full.

    mark: makes a mark behind all work so far.
    """

    def __init__(self, device: torch.device, mark: Callable[[torch.device], Mark] = mark_now):
        self._device, self._mark = device, mark
        self._under_way: deque[tuple[Mark, int]] = deque()
        self._unmarked = 0

    def wait(self) -> None:
        """Block until one more layer may be launched."""
        while self._unmarked + sum(count for _, count in self._under_way) >= AHEAD:
            mark, _ = self._under_way.popleft()
            mark.block()

    def launched(self, forwards: int) -> None:
        """As much as so many layers' forwards has been launched."""
        self._unmarked += forwards
        if self._unmarked >= MARKED:
            self._under_way.append((self._mark(self._device), self._unmarked))
            self._unmarked = 0
