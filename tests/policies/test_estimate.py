"""What is known of a program's times before it has run."""

import numpy as np
import pytest

import roundel
from roundel.policies.dag import Dag
from roundel.policies.estimate import _at_even_shares, gone_before
from roundel.policies.lowering import lower
from roundel.policies.program import Program
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program

from ..costs import make_machine, make_trace

POLICIES = [
    roundel.LayerToLayer(),
    roundel.LayerToLayer(
        partition=(2, 2, 2, 2), backward_partition=(2, 2, 2, 2), optimizer_on="device"
    ),
    roundel.RoundRobin(partition=(3, 3), backward_partition=(2, 3, 3)),
    roundel.RoundRobin(partition=(3, 3), backward_partition=(2, 3, 3), optimizer="stale"),
    roundel.OneFOneB(optimizer_on="host"),
    roundel.ZBV(),
]


def program_of(
    policy: roundel.Policy, bytes_per_s: int, devices: int, params_per_s: int = 10**9, **more: int
) -> Program:
    sizes = {"param_bytes": 7, "grad_bytes": 7, "output_bytes": 5, "optimizer_bytes": 14, **more}
    machine = make_machine(devices, bytes_per_s, params_per_s=params_per_s)
    work = Work(make_trace(8, **sizes), machine, 4)
    return lower([policy.plan(work, 0)], work)


@pytest.mark.parametrize("bytes_per_s", [10**8, 10**9, 10**10])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_ops_can_wait_for_all_that_should_have_gone_by_then(
    policy: roundel.Policy, bytes_per_s: int
) -> None:
    check_waits(program_of(policy, bytes_per_s, 2))


def test_what_ends_as_an_op_without_duration_begins_may_wait_for_that() -> None:
    """Updates among the ops that take no time."""
    program = program_of(POLICIES[1], 10**10, 2, params_per_s=0, update_workspace_bytes=20)
    check_waits(program)


def check_waits(program: Program) -> None:
    before, after = program.edges()
    plain = Dag(before, after, _at_even_shares(program))
    plain.run_roots()
    pairs = gone_before(program)
    more = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    waits = Dag(
        np.concatenate((before, more[0])),
        np.concatenate((after, more[1])),
        _at_even_shares(program),
    )
    waits.run_roots()
    assert waits.done == len(program), "tasks wait in a circle"
    assert waits.start_ns.tolist() == plain.start_ns.tolist()

    gone = {task: {transfer for transfer, op in pairs if op == task} for _, task in pairs}
    for lane in range(len(program.lanes)):
        tasks = program.tasks_of(lane)
        place = {task: number for number, task in enumerate(tasks)}
        for device in range(2):
            latest = -1
            for op in ops_of(program, device):
                latest = max([latest, *(place[each] for each in gone.get(op, ()) if each in place)])
                done = [
                    place[task]
                    for task in tasks
                    if program.source[task] == device
                    and program.target[task] < 0
                    and plain.end_ns[task] < plain.start_ns[op]
                ]
                assert not done or max(done) <= latest


def ops_of(program: Program, device: int) -> list[int]:
    number = next(
        number
        for number, lane in enumerate(program.lanes)
        if lane.device == device and lane.kind == "compute"
    )
    return program.tasks_of(number)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_constant_hop_stands_for_the_links_as_in_a_simulation(policy: roundel.Policy) -> None:
    machine = make_machine(2, 10**3).with_hop(700)
    work = Work(make_trace(8, param_bytes=7, grad_bytes=7, output_bytes=5), machine, 4)
    program = lower([policy.plan(work, 0)], work)
    dag = Dag(*program.edges(), _at_even_shares(program))
    dag.run_roots()
    assert dag.end_ns.max() == simulate_program(program, "any").makespan_ns
