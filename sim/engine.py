"""simulate_program: what would happen. Every task at its time, shared links included."""

from typing import cast

import numpy as np
import simpy
from numpy.typing import NDArray

from ..policies.dag import Dag, fast
from ..policies.program import Program
from ..policies.record import record
from ..traces.timeline import Ints, Timeline
from .links import SharedLinks
from .paths import Network, Path


def simulate_program(program: Program, name: str) -> Timeline:
    """The timeline of `program`, each task as early as its lane and its dependencies allow.

    Times are integer nanoseconds. A task whose duration cannot depend on others is evaluated at
    once, whatever the clock says; only transfers over a link that may be shared are events.
    Raises InputError when the machine has no path for a transfer.
    """
    duration, shared, paths, network, contended = _transfer_times(program)
    dag = Dag(*program.edges(), duration, shared)
    if contended:
        _Run(program, dag, paths, network, contended).run()
    else:
        dag.run_roots()
    assert dag.done == len(program), "a lowered program cannot deadlock"
    times = dag.start_ns, dag.end_ns
    del dag, duration, shared
    return record(program, *times, name, "simulated")


class _Run:
    """The SimPy part: transfers on contended links wait for their share of bandwidth."""

    def __init__(
        self,
        program: Program,
        dag: Dag,
        paths: dict[int, Path],
        network: Network,
        contended: set[int],
    ) -> None:
        self._env = simpy.Environment()
        self._links = SharedLinks(self._env, network.bytes_per_ns, contended, self._ended)
        self._dag = dag
        self._paths = paths
        self._route = fast(_routes(program))
        self._nbytes = fast(program.nbytes)

    def run(self) -> None:
        self._arrive(self._dag.run_roots())
        self._env.run()

    def _arrive(self, tasks: list[int]) -> None:
        starts, now = self._dag.start_ns, int(self._env.now)
        for task in tasks:
            path = self._paths[self._route[task]]
            event = self._env.timeout(int(starts[task]) + path.latency_ns - now, (task, path))
            event.callbacks.append(self._enter)

    def _enter(self, arrival: simpy.Event) -> None:
        task, path = cast(tuple[int, Path], arrival.value)
        self._links.enter(task, self._nbytes[task], path)

    def _ended(self, task: int) -> None:
        self._arrive(self._dag.release(task, int(self._env.now)))


def _routes(program: Program) -> Ints:
    """A number for each (source, target) pair."""
    devices = program.work.devices + 1
    return (program.source.astype(np.int64) + 1) * devices + program.target + 1


def _transfer_times(
    program: Program,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[int, Path], Network, set[int]]:
    """Durations of all tasks, and which transfers must share a link instead."""
    duration = program.duration_ns.astype(np.int64)
    shared = np.zeros(len(program), dtype=np.bool_)
    machine = program.work.machine
    network = Network(machine)
    moves = np.flatnonzero(program.moves)
    if machine.hop_ns is not None:
        between = (program.source[moves] >= 0) & (program.target[moves] >= 0)
        duration[moves] = np.where(between, machine.hop_ns, 0)
        return duration, shared, {}, network, set()
    route = _routes(program)[moves]
    devices = program.work.devices + 1
    paths = {
        int(each): network.path(int(each) // devices - 1, int(each) % devices - 1)
        for each in np.unique(route)
    }
    users: dict[int, set[Path]] = {}
    for pair in np.unique(np.stack((program.lane[moves], route)), axis=1).T.tolist():
        users.setdefault(pair[0], set()).add(paths[pair[1]])
    contended = network.contended(users)
    for number, path in paths.items():
        mine = moves[route == number]
        if contended & set(path.links):
            shared[mine] = True
        else:
            exact = -(-program.nbytes[mine] // path.bytes_per_ns)
            duration[mine] = path.latency_ns + exact.astype(np.int64)
    return duration, shared, paths, network, contended
