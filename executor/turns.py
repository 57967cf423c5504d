"""Turns: whose it is to launch work on a GPU."""

import threading
from collections import deque


class Turns:
    """A lock that goes to whoever has waited longest.

    Threads that launch kernels at the same time take Python's lock from each other at every kernel,
    and each needs longer than both need one after the other; so they take turns, a layer each. A
    plain lock goes to whoever asks first, which is who has just let go of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
