"""Turns: whose it is to run Python for the GPUs."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that goes to whoever has waited longest.

    torch lets go of Python's lock in every operation and takes it again behind it, and a thread
    that wants it meanwhile gets it: a layer's launches then take as long as all that others run
    beside them, and a wake-up of a thread at each. So lanes take turns, a task or a layer each,
    and whoever waits for something else does so `outside`. A plain lock goes to whoever asks
    first, which is who has just let go of it.

    needed: False where nothing is gained, as on the CPU, which computes in the calling thread.
    """

    def __init__(self, needed: bool = True) -> None:
        self._needed = needed
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False
        self._holder = 0

    def __enter__(self) -> None:
        if self._needed:
            self._take()
            self._holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        if not self._needed:
            return
        self._holder = 0
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    @contextmanager
    def outside(self) -> Iterator[None]:
        """For the time of a wait the turn is others'; afterwards it is ours again, if it was."""
        if self._holder != threading.get_ident():
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _take(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()
