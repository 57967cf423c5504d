"""estimate: a program's timeline if transfers took no time. For memory before anything has run."""

import numpy as np

from ..traces.timeline import Ints, Timeline
from .asymmetric import shared_bytes_per_s
from .dag import Dag
from .program import Program
from .record import record


def program_edges(program: Program) -> tuple[Ints, Ints]:
    """(before, after) pairs: the dependencies, and each lane's order."""
    tasks = program.lane_tasks
    same = program.lane[tasks[1:]] == program.lane[tasks[:-1]]
    before = np.concatenate((program.dep_before, tasks[:-1][same]))
    return before, np.concatenate((program.dep_after, tasks[1:][same]))


def rough_makespan_ns(program: Program) -> int:
    """The end of a program's last task if every transfer had its even share of the links.

    Quicker than the simulator, which lets transfers share what they really meet on.
    """
    machine = program.work.machine
    rate = shared_bytes_per_s(machine)
    moves = program.source != program.target
    duration = program.duration_ns.astype(np.int64)
    if rate:
        duration[moves] = program.nbytes[moves] * (1e9 / rate)
    dag = Dag(*program_edges(program), duration)
    dag.run_roots()
    return int(dag.end_ns.max(initial=0))


def estimate(program: Program, name: str) -> Timeline:
    """The timeline with transfers that take no time: what comes early in memory comes earliest."""
    dag = Dag(*program_edges(program), program.duration_ns.astype(np.int64))
    dag.run_roots()
    return record(program, dag.start_ns, dag.end_ns, name, "simulated")
