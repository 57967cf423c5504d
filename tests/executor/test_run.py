"""When tasks ran: ends are marked, starts follow from them."""

import pytest

import roundel
from roundel.executor.lanes import LaneThread
from roundel.executor.run import Run
from roundel.executor.streams import Clock, CpuMark, CpuStream
from roundel.policies.lowering import lower
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program

from ..costs import make_machine, make_trace
from . import toy

CUTS = {"partition": (3, 3), "backward_partition": (2, 3, 3)}


class At(CpuMark):
    """A mark that was reached at a given time."""

    def __init__(self, time_ns: int) -> None:
        super().__init__()
        self._time_ns = time_ns

    def time_ns(self, clock: Clock) -> int:
        return self._time_ns


def ran(policy: roundel.Policy) -> tuple[Run, list[int], list[int]]:
    """A run with the ends of its simulation and threads that were never late; starts and ends."""
    trace = make_trace(8, param_bytes=50, grad_bytes=50, optimizer_bytes=100, output_bytes=20)
    machine = make_machine(2, params_per_s=10**9)
    program = lower([policy.plan(Work(trace, machine, 4), 0)], Work(trace, machine, 4))
    timeline = simulate_program(program, "ran")
    run = Run(program)
    run.ended = [At(each) for each in timeline.end_ns.tolist()]
    return run, timeline.start_ns.tolist(), timeline.end_ns.tolist()


@pytest.mark.parametrize(
    "policy",
    [
        roundel.OneFOneB(recompute="late"),
        roundel.RoundRobin(**CUTS),
        roundel.RoundRobin(**CUTS, optimizer_on="device"),
        roundel.LayerToLayer(**CUTS),
    ],
    ids=lambda policy: policy.name,
)
def test_a_task_starts_when_all_that_it_waits_for_has_ended(policy: roundel.Policy) -> None:
    run, starts, ends = ran(policy)
    clock = Clock({})
    run.begun_ns = [clock.start_ns] * len(ends)
    assert run.times_ns(clock) == (starts, ends)


def test_a_task_starts_no_sooner_than_its_thread_or_what_it_came_behind() -> None:
    run, starts, ends = ran(roundel.OneFOneB())
    clock = Clock({})
    run.begun_ns = [clock.start_ns] * len(ends)
    first, last = run.program.tasks_of(0)[0], run.program.tasks_of(0)[-1]
    assert (starts[first], ends[first] > 4) == (0, True)
    run.behind[first] = [At(-3), At(2)]
    assert run.times_ns(clock)[0][first] == 2
    run.begun_ns[first] += 4
    assert run.times_ns(clock)[0][first] == 4
    # By another device's clock: not behind its own end.
    run.behind[last] = [At(ends[last] + 5)]
    assert run.times_ns(clock)[0][last] == ends[last]


def test_a_run_comes_behind_the_last_task_of_the_one_before_on_each_lane() -> None:
    trace, machine = make_trace(2), make_machine(1)
    program = lower([roundel.GPipe().plan(Work(trace, machine, 1), 0)], Work(trace, machine, 1))
    lane = next(number for number, each in enumerate(program.lanes) if each.kind == "compute")
    thread = LaneThread("behind", CpuStream())
    before, run = Run(program), Run(program)
    for each in (before, run):
        thread.submit(each, lane, lambda task: None)
    run.wait()
    thread.close()
    first, *_, last = program.tasks_of(lane)
    assert before.behind == {}
    assert run.behind == {first: [before.ended[last]]}


def test_what_a_task_waits_for_of_the_step_before_is_kept() -> None:
    """A stale step begins while the one before it ends."""
    policy = roundel.RoundRobin(**CUTS, optimizer="stale")
    with toy.make(toy.blocks(), policy) as trainer:
        results = [trainer.step(*batch) for batch in toy.vectors(steps=3)]
        trainer.flush()
        run = results[-1]._run
    waited = {task: marks for task, marks in run.behind.items() if len(marks) > 1}
    assert waited
    clock = results[-1]._clock
    starts, ends = run.times_ns(clock)
    for task, marks in run.behind.items():
        assert starts[task] >= min(ends[task], max(mark.time_ns(clock) for mark in marks))
