"""SharedLinks: transfers under way share the bandwidth of the links that they cross."""

from collections.abc import Callable
from math import inf

import simpy

from .paths import Path, transfer_ns


class _Flow:
    """A transfer under way."""

    __slots__ = ("at_ns", "links", "most", "rate", "remaining", "task", "turn")

    def __init__(self, task: int, nbytes: int, links: tuple[int, ...], most: float) -> None:
        self.task = task
        self.remaining = float(nbytes)
        self.links = links
        self.most = most
        self.rate = 0.0
        self.at_ns = 0
        self.turn = 0


class SharedLinks:
    """A link gives each transfer under way an equal part; a transfer is as fast as its worst link.

    What a transfer leaves unused of its part is not handed to the others (equal split, not
    max-min fairness), so shared transfers are never predicted too fast.
    """

    def __init__(
        self,
        env: simpy.Environment,
        bytes_per_ns: list[float],
        contended: set[int],
        done: Callable[[int], None],
    ) -> None:
        self._env = env
        self._capacity = bytes_per_ns
        self._contended = contended
        self._done = done
        self._flows: list[list[_Flow]] = [[] for _ in bytes_per_ns]

    def enter(self, task: int, nbytes: int, path: Path) -> None:
        """The transfer of `task` starts to move bytes now; `done(task)` is called when it ends."""
        links = tuple(link for link in path.links if link in self._contended)
        flow = _Flow(task, nbytes, links, path.bytes_per_ns)
        flow.at_ns = int(self._env.now)
        for link in links:
            self._flows[link].append(flow)
        self._share(flow)

    def _leave(self, flow: _Flow) -> None:
        for link in flow.links:
            self._flows[link].remove(flow)
        self._share(flow)
        self._done(flow.task)

    def _share(self, cause: _Flow) -> None:
        """Renew the rate of every transfer that shares a link with `cause`."""
        touched: dict[int, _Flow] = {}
        for link in cause.links:
            for flow in self._flows[link]:
                touched[id(flow)] = flow
        for flow in touched.values():
            self._renew(flow)

    def _renew(self, flow: _Flow) -> None:
        rate = flow.most
        for link in flow.links:
            part = self._capacity[link] / len(self._flows[link])
            if part < rate:
                rate = part
        if rate == flow.rate:
            return
        now = int(self._env.now)
        flow.remaining -= flow.rate * (now - flow.at_ns)
        flow.at_ns, flow.rate = now, rate
        flow.turn += 1
        self._plan_end(flow, flow.turn)

    def _plan_end(self, flow: _Flow, turn: int) -> None:
        left = max(0, transfer_ns(flow.remaining, flow.rate)) if flow.rate < inf else 0
        event = self._env.timeout(left)
        event.callbacks.append(lambda _: self._leave(flow) if flow.turn == turn else None)
