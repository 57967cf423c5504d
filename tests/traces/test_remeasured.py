"""A timeline that becomes a trace again."""

import numpy as np
import pytest

import roundel
from roundel.policies.lowering import lower
from roundel.policies.plan import Place
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.machine import Host, ideal_machine
from roundel.traces.remeasured import machine_of_timeline, trace_of_timeline
from roundel.traces.timeline import KIND_CODE, KINDS

from ..costs import make_trace, make_work
from ..policies.test_plan import plan_of


@pytest.mark.parametrize(
    "policy",
    [
        roundel.GPipe(recompute="late", partition=(3, 2)),
        roundel.ZBH1(partition=(2, 3)),
        roundel.RoundRobin(partition=(2, 1, 2), backward_partition=(1, 2, 2)),
    ],
    ids=lambda policy: policy.name,
)
def test_a_simulated_timeline_gives_its_own_trace_back(policy: roundel.Policy) -> None:
    times = [(10, 20, 12), (30, 50, 30), (7, 9, 5), (100, 200, 110), (40, 80, 0)]
    only = [8, 30, 6, 90, 12]
    trace = make_trace([times[0]] * 5)
    layers = tuple(
        layer.model_copy(
            update={
                "forward_ns": f * 1000,
                "backward_ns": b * 1000,
                "recompute_ns": r * 1000,
                "forward_only_ns": o * 1000,
                "backward_input_ns": b * 600,
                "backward_weight_ns": b * 400,
            }
        )
        for layer, (f, b, r), o in zip(trace.layers, times, only, strict=True)
    )
    trace = trace.model_copy(update={"layers": layers})
    done = roundel.simulate(trace, policy, devices=2, microbatches=4)
    again = trace_of_timeline(done.timeline, trace)
    timed = roundel.simulate(again, policy, devices=2, microbatches=4)
    assert timed.timeline.makespan_ns == done.timeline.makespan_ns
    assert "from a measured timeline" in again.provenance


def test_times_that_were_twice_as_long_are_twice_as_long() -> None:
    trace = make_trace([(10, 20, 12)] * 4)
    policy = roundel.OneFOneB(recompute="late", partition=(3, 1))
    timeline = roundel.simulate(trace, policy, devices=2, microbatches=3).timeline
    forward = timeline.kind == KINDS.index("F")
    timeline.end_ns[forward] += (timeline.end_ns - timeline.start_ns)[forward]
    # One op out of line does not count: the median does.
    timeline.end_ns[np.flatnonzero(forward)[0]] += 10**6
    again = trace_of_timeline(timeline, trace)
    for before, after in zip(trace.layers, again.layers, strict=True):
        # All forwards leave what backward needs to a recompute.
        assert after.forward_only_ns == 2 * before.forward_ns
        assert after.forward_ns == before.forward_ns
        assert after.backward_ns == before.backward_ns
        assert after.recompute_ns == before.forward_ns


@pytest.mark.parametrize("recomputing", [0, 1])
def test_only_forwards_that_a_recompute_follows_left_nothing(recomputing: int) -> None:
    """Of one step's two microbatches the first is recomputed, and in the other step neither."""
    layers = [(10, 12, 8)]
    work = make_work(layers, 1, 2, forward_only_ns=4)
    recomputes = plan_of("0:1F0 0:1F1 0:1R0 0:1B0 0:1B1")
    keeps = plan_of("0:1F0 0:1F1 0:1B0 0:1B1")
    plans = [keeps, keeps]
    plans[recomputing] = recomputes
    timeline = simulate_program(lower(plans, work), "mixed")
    again = trace_of_timeline(timeline, work.trace).layers[0]
    assert (again.forward_only_ns, again.forward_ns, again.recompute_ns) == (4, 10, 10)


def test_recomputes_tell_of_the_layer_behind_which_its_backward_comes() -> None:
    trace = make_trace(3, recompute_ns=9, recompute_last_ns=6)
    plan = plan_of("0:2F0 2:3F0 2:3B0 0:2R0 0:2B0")
    timeline = simulate_program(lower([plan], Work(trace, ideal_machine(1), 1)), "twice")
    again = timeline.kind == KIND_CODE["R"]
    timeline.end_ns[again] += (timeline.end_ns - timeline.start_ns)[again]
    found = trace_of_timeline(timeline, trace).layers
    assert [(each.recompute_ns, each.recompute_last_ns) for each in found] == [
        *((18, 6), (12, 12), (9, 6)),
    ]
    program = lower([plan], Work(trace.model_copy(update={"layers": found}), ideal_machine(1), 1))
    assert program.duration_ns[program.kind == KIND_CODE["R"]].tolist() == [18 + 12]
    without = trace_of_timeline(timeline, make_trace(3)).layers
    assert [(each.recompute_ns, each.recompute_last_ns) for each in without] == [
        *((15, None), (15, None), (None, None)),
    ]


@pytest.mark.parametrize("place", ["host", "device"])
def test_updates_tell_of_the_host_and_of_each_device(place: Place) -> None:
    trace = make_trace(4, trainable_params=1000, param_bytes=8, grad_bytes=8)
    machine = ideal_machine(2)
    machine = machine.model_copy(
        update={
            "host": Host(optimizer_params_per_s=10**9, sum_params_per_s=4 * 10**9),
            "devices": tuple(
                each.model_copy(update={"optimizer_params_per_s": 2 * 10**9})
                for each in machine.devices
            ),
        }
    )
    policy = roundel.RoundRobin((1, 1), (2, 1, 1), optimizer_on=place, round_size=2)
    work = Work(trace, machine, 4)
    predicted = simulate_program(lower([policy.plan(work, 0)], work), "one")
    measured = simulate_program(lower([policy.plan(work, 0)], work), "one")
    slow = measured.kind == KIND_CODE["update"]
    if place == "device":
        slow &= np.array([span.lane.device == 1 for span in measured.spans()])
    measured.end_ns[slow] += (measured.end_ns - measured.start_ns)[slow]
    again = machine_of_timeline(measured, predicted, machine)
    host, devices = again.host, again.devices
    rates = [host.optimizer_params_per_s, host.sum_params_per_s]
    rates += [each.optimizer_params_per_s for each in devices]
    on_host = [10**9 // 2, 2 * 10**9, 2 * 10**9, 2 * 10**9]
    assert rates == (on_host if place == "host" else [10**9, 4 * 10**9, 2 * 10**9, 10**9])
    assert again.links == machine.links
