"""Paths: which links a transfer takes, and which of them it can ever have to share."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import networkx as nx

from ..traces.errors import InputError
from ..traces.machine import HOST, Link, Machine

MEASURE_BYTES = 2**20
"""The shortest path is the one that carries this many bytes soonest."""


@dataclass(frozen=True)
class Path:
    """The directed links from one node to another: numbers, summed latency, narrowest rate."""

    links: tuple[int, ...]
    latency_ns: int
    bytes_per_ns: float


def transfer_ns(nbytes: float, bytes_per_ns: float) -> int:
    """Whole nanoseconds, rounded up."""
    return -int(-nbytes // bytes_per_ns)


class Network:
    """The links of a machine, a number per direction (one for both where it is half duplex)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.bytes_per_ns: list[float] = []
        self._graph: nx.DiGraph[str] = nx.DiGraph()
        self._graph.add_nodes_from([HOST, *(device.name for device in machine.devices)])
        for link in machine.links:
            self._add(link)
        self.path = cache(self._path)

    def _add(self, link: Link) -> None:
        there = self._number(link)
        back = self._number(link) if link.duplex else there
        cost = link.latency_ns + MEASURE_BYTES * 1e9 / link.bytes_per_s
        self._graph.add_edge(link.a, link.b, number=there, link=link, cost=cost)
        self._graph.add_edge(link.b, link.a, number=back, link=link, cost=cost)

    def _number(self, link: Link) -> int:
        self.bytes_per_ns.append(link.bytes_per_s / 1e9)
        return len(self.bytes_per_ns) - 1

    def _name(self, device: int) -> str:
        return HOST if device < 0 else self.machine.devices[device].name

    def _path(self, source: int, target: int) -> Path:
        """The path between two devices (-1: the host). Raises InputError when there is none."""
        ends = self._name(source), self._name(target)
        try:
            nodes = nx.shortest_path(self._graph, *ends, weight="cost")
        except nx.NetworkXNoPath:
            raise InputError(
                f"machine {self.machine.name}: links: no path from {ends[0]} to {ends[1]}; add one"
            ) from None
        edges = [self._graph.edges[pair] for pair in pairwise(nodes)]
        return Path(
            tuple(edge["number"] for edge in edges),
            sum(edge["link"].latency_ns for edge in edges),
            min(edge["link"].bytes_per_s for edge in edges) / 1e9,
        )

    def contended(self, users: dict[int, set[Path]]) -> set[int]:
        """The links that can be a bottleneck, given each lane's paths (a lane moves one at a time).

        A link is one only where the lanes that use it, each at the full rate of its fastest path,
        ask for more than it has.
        """
        count: Counter[int] = Counter()
        fastest: dict[int, float] = {}
        for paths in users.values():
            for link in {link for path in paths for link in path.links}:
                count[link] += 1
                rates = [path.bytes_per_ns for path in paths if link in path.links]
                fastest[link] = max(fastest.get(link, 0.0), *rates)
        return {
            link
            for link in count
            if count[link] * fastest[link] > self.bytes_per_ns[link] * 1.000001
        }
