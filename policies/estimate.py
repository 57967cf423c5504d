"""Estimates of a program's time and memory, quicker than the simulator's."""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Lane, MemoryCurve
from .asymmetric import shared_bytes_per_s
from .dag import Dag
from .program import Program
from .record import record


def rough_makespan_ns(program: Program) -> int:
    """The end of a program's last task if every transfer had its even share of the links.

    Quicker than the simulator, which lets transfers share what they really meet on.
    """
    return int(_run(program, _at_even_shares(program)).end_ns.max(initial=0))


def estimated_memory(program: Program, name: str) -> tuple[MemoryCurve, ...]:
    """The devices' memory and the host's, before anything has run.

    Of transfers that take no time, where what comes early comes earliest, and of such that have
    their even share of the links, where what is under way stays: of each memory the higher.
    """
    curves = []
    for duration in (program.duration_ns.astype(np.int64), _at_even_shares(program)):
        dag = _run(program, duration)
        curves.append(record(program, dag.start_ns, dag.end_ns, name, "simulated").memory)
    pairs = zip(*curves, strict=True)
    return tuple(max(pair, key=lambda curve: curve.peak_bytes) for pair in pairs)


def gone_before(program: Program) -> list[tuple[int, int]]:
    """(transfer, op): the transfers from a device to the host that are done when its ops start.

    Of each lane the latest one, where it is not the same as the op's before. If every transfer had
    its even share of the links: an order that the program can keep to.
    """
    dag = _run(program, _at_even_shares(program))
    pairs = []
    for number, lane in enumerate(program.lanes):
        tasks = program.lane_tasks[slice(*program.lane_start[number : number + 2])]
        tasks = tasks[(program.source[tasks] >= 0) & (program.target[tasks] < 0)]
        if not len(tasks):
            continue
        home = program.lanes.index(Lane(lane.device, "compute"))
        ops = program.lane_tasks[slice(*program.lane_start[home : home + 2])]
        # Not what ends at that very moment: it might wait for an op that takes no time.
        done = np.searchsorted(dag.end_ns[tasks], dag.start_ns[ops], side="left")
        new = np.flatnonzero(np.diff(done, prepend=0))
        pairs += list(zip(tasks[done[new] - 1].tolist(), ops[new].tolist(), strict=True))
    return pairs


def _at_even_shares(program: Program) -> NDArray[np.int64]:
    machine = program.work.machine
    duration = program.duration_ns.astype(np.int64)
    moves = program.moves
    if machine.hop_ns is not None:
        # It stands for all links: as in a simulation, what goes to the host takes no time.
        between = moves & (program.source >= 0) & (program.target >= 0)
        return np.where(between, machine.hop_ns, duration)
    _take(program, duration, moves, shared_bytes_per_s(machine))
    number = {device.name: place for place, device in enumerate(machine.devices)}
    for link in machine.links:
        if link.a in number and link.b in number:
            for ends in permutations((number[link.a], number[link.b])):
                between = (program.source == ends[0]) & (program.target == ends[1])
                _take(program, duration, between, link.bytes_per_s)
    return duration


def _take(
    program: Program, duration: NDArray[np.int64], moves: NDArray[np.bool_], rate: int
) -> None:
    if rate:
        duration[moves] = program.nbytes[moves] * (1e9 / rate)


def _run(program: Program, duration_ns: NDArray[np.int64]) -> Dag:
    dag = Dag(*program.edges(), duration_ns)
    dag.run_roots()
    return dag
