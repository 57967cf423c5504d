"""RoundRobin: the picture of its order, its rounds and rotation, and its cut."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.policies.asymmetric import AsymmetricCut, good_cuts, upload_ns
from roundel.policies.estimate import rough_makespan_ns
from roundel.policies.lowering import lower
from roundel.policies.near_cuts import finer
from roundel.policies.op import Op
from roundel.policies.plan import Plan
from roundel.policies.round_robin import RoundRobin
from roundel.policies.streamed import CANDIDATES
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.errors import InputError
from roundel.traces.machine import Device, Host, Link, Machine, ideal_machine

from ..costs import make_machine, make_trace, make_work

# arXiv 2604.27085: visits rotate; the last forward layers and the head are one visit, F then B.
TWO_DEVICES = """
gpu0   gpu1
0:2F0  2:4F0
0:2F1  2:4F1
4:5F0  3:4R0
4:5B0  3:4B0
4:5F1  3:4R1
4:5B1  3:4B1
1:3R0  0:1R0
1:3B0  0:1B0
1:3R1  0:1R1
1:3B1  0:1B1
"""


def test_picture() -> None:
    policy = RoundRobin((2, 2), (1, 1, 2, 1))
    plan = policy.plan(make_work(5, 2, 2), 0)
    assert plan.grid().split() == TWO_DEVICES.split()
    assert (plan.weights, plan.optimizer_on, plan.activations) == ("streamed", "host", "host")
    assert not plan.late_recompute


def test_a_forward_cut_of_all_layers_recomputes_the_first_backward_stage_too() -> None:
    plan = RoundRobin((2, 1), (1, 2)).plan(make_work(3, 2, 1), 0)
    assert [str(op) for op in plan.devices[0]] == ["0:2F0", "2:3R0", "2:3B0"]
    assert [str(op) for op in plan.devices[1]] == ["2:3F0", "0:2R0", "0:2B0"]


def test_the_rotation_goes_on_over_rounds_and_steps() -> None:
    policy = RoundRobin((1, 1), (1, 1, 1))
    work = make_work(3, 2, 4)
    assert policy.rounds(work, policy.cut(work)) == [range(0, 2), range(2, 4)]
    first = policy.plan(work, 0)
    # Five visits a round: the second round starts on the other device, the second step does not.
    assert str(first.devices[0][0]) == "0:1F0"
    assert "0:1F2" in map(str, first.devices[1])
    assert "0:1F2" not in map(str, first.devices[0])
    assert policy.plan(work, 1) == first
    odd = make_work(3, 2, 2)
    assert str(policy.plan(odd, 0).devices[0][0]) == "0:1F0"
    assert str(policy.plan(odd, 1).devices[1][0]) == "0:1F0"


@pytest.mark.parametrize(
    ("devices", "microbatches", "size", "rounds"),
    [
        (8, 16, None, [8, 8]),
        (8, 10, None, [10]),
        (8, 3, None, [3]),
        (8, 20, None, [10, 10]),
        (1, 3, None, [1, 1, 1]),
        (2, 7, 3, [3, 4]),
        (2, 7, 99, [7]),
    ],
)
def test_rounds_are_as_many_as_fit_evenly_filled(
    devices: int, microbatches: int, size: int | None, rounds: list[int]
) -> None:
    policy = RoundRobin((1, 1), (1, 1, 1), round_size=size)
    work = make_work(3, devices, microbatches)
    assert [len(each) for each in policy.rounds(work, policy.cut(work))] == rounds


def test_a_round_is_long_enough_to_hide_its_uploads() -> None:
    # 1 byte a nanosecond: a layer's weights take 95 ns, its forward 10 ns a microbatch.
    work = Work(make_trace(3, param_bytes=95), make_machine(1), 40)
    policy = RoundRobin((1, 1), (1, 1, 1))
    assert upload_ns(work, 0, 1) == 95
    assert {len(each) for each in policy.rounds(work, policy.cut(work))} == {10}


def test_uploads_of_all_devices_share_the_host() -> None:
    machine = make_machine(4, host_bytes_per_s=2 * 10**9)
    work = Work(make_trace(3, param_bytes=95), machine, 40)
    assert upload_ns(work, 0, 2) == 2 * 190
    assert upload_ns(Work(work.trace, ideal_machine(4), 1), 0, 2) == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RoundRobin(recompute="none"), "must recompute; use recompute early or late"),
        (RoundRobin(partition=(3, 2)), "give both cuts"),
        (RoundRobin(backward_partition=(3, 2)), "give both cuts"),
        (RoundRobin((2, 2), (1, 2)), r"partition 2 2 / 1 2: the backward cut has 3 layers"),
        (RoundRobin((2, 1), (1, 4)), "leave out just the 1 of the first backward stage; it leaves"),
        (RoundRobin((2, 0, 2), (1, 4)), "every stage must have at least one layer"),
        (RoundRobin((2, 2), (1, 4), round_size=-1), "round_size: must be at least 1"),
    ],
)
def test_wrong_knobs_say_what_to_do(policy: RoundRobin, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        policy.plan(make_work(5, 2, 2), 0)
    assert "\n" not in str(caught.value)


def sizes_of(layers: int) -> list[tuple[int, ...]]:
    """All ways to cut so many layers into stages."""
    cuts = [
        (0, *inner, layers)
        for count in range(layers)
        for inner in combinations(range(1, layers), count)
    ]
    return [tuple(b - a for a, b in pairwise(bounds)) for bounds in cuts] if layers else [()]


def score(work: Work, cut: AsymmetricCut) -> int:
    """(M S + N (N - 1)) t, the formula of the paper, from the visits themselves."""
    forward, inputs, weights = (work.layer_ns(kind) for kind in "FIW")
    times, first = [], 0
    for size in cut.forward:
        times.append(sum(forward[first : first + size]))
        first += size
    stop = work.layers
    for size in cut.backward:
        # A recompute takes as long as a forward here, so first visit and others cost alike.
        times.append(sum(sum(each[stop - size : stop]) for each in (forward, inputs, weights)))
        stop -= size
    devices = work.devices
    return (work.microbatches * len(times) + devices * (devices - 1)) * max(times)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=2, max_size=6),
    st.integers(1, 4),
    st.integers(1, 8),
)
def test_the_most_promising_cut_is_the_best_of_all_by_the_papers_formula(
    layers: list[tuple[int, int, int]], devices: int, microbatches: int
) -> None:
    work = make_work(layers, devices, microbatches)
    all_cuts = [
        AsymmetricCut(forward, backward)
        for backward in sizes_of(len(layers))
        for forward in sizes_of(len(layers) - backward[0])
    ]
    best = min(score(work, cut) for cut in all_cuts)
    found = good_cuts(work, CANDIDATES)
    assert min(score(work, cut) for cut in found) == best
    for cut in found:
        cut.check(work.layers)


def test_cuts_keep_to_the_devices_memory_where_they_can() -> None:
    trace = make_trace(8, param_bytes=100, saved_bytes=50)
    free = RoundRobin().cut(Work(trace, make_machine(1), 4))
    tight = RoundRobin().cut(Work(trace, make_machine(1, memory_bytes=520), 4))
    hopeless = RoundRobin().cut(Work(trace, make_machine(1, memory_bytes=10), 4))
    assert max(free.backward) == 8
    # Twice the weights and the saved tensors of two layers are 500 bytes.
    assert max((*tight.forward, *tight.backward)) == 2
    assert max((*hopeless.forward, *hopeless.backward)) == 1


def test_a_stale_optimizer_may_want_another_cut_than_a_synchronous_one() -> None:
    work = make_work([(15, 9, 6)] * 12, 4, 8)
    sync, stale = RoundRobin(), RoundRobin(optimizer="stale")
    assert sync.step_ns(work, sync.cut(work)) <= sync.step_ns(work, stale.cut(work))
    assert stale.step_ns(work, stale.cut(work)) <= stale.step_ns(work, sync.cut(work))


def test_finer_cuts_leave_less_at_both_ends() -> None:
    cuts = [str(cut) for cut in finer(AsymmetricCut((5, 2), (1, 4, 3)))]
    assert cuts == [
        "1 4 2 / 1 4 2 1",
        "2 3 1 1 / 1 2 2 1 2",
        "1 1 1 2 1 1 / 1 1 1 1 1 1 1 1",
        "1 1 1 1 1 1 1 / 1 1 1 1 1 1 1 1",
    ]


def test_a_rough_makespan_counts_transfers_at_an_even_share_and_updates() -> None:
    """One layer, one microbatch, 10 GB of weights: up, forward and backward, down, update."""
    trace = make_trace([(10**9, 10**9, 10**9)], param_bytes=10**10, grad_bytes=10**10)
    machine = Machine(
        name="test",
        host=Host(optimizer_params_per_s=10**10),
        devices=(Device(name="gpu0"), Device(name="gpu1")),
        links=tuple(Link(a="host", b=f"gpu{n}", bytes_per_s=10**10) for n in range(2)),
    )
    work = Work(trace, machine.first_devices(1), 1)
    program = lower([RoundRobin((), (1,)).plan(work, 0)], work)
    expected = 10**9 + 3 * 10**9 + 10**9 + 10**9 // 2
    # Each of the chunks of an upload is rounded down.
    assert rough_makespan_ns(program) == pytest.approx(expected, abs=200)


def test_a_cut_is_tried_on_as_many_microbatches_as_a_round_has() -> None:
    work = make_work(4, 2, 64)
    assert RoundRobin().enough(work) == 8
    assert RoundRobin(round_size=20).enough(work) == 20


def test_a_step_begins_in_pieces_where_uploads_take_time() -> None:
    """Its first forward starts with the first of its layers, not when the last one is up."""
    cut = {"partition": (2, 20), "backward_partition": (2, 11, 11)}
    trace = make_trace(24, param_bytes=10)
    slow = Work(trace, make_machine(2, host_bytes_per_s=2 * 10**9), 6)
    policy = RoundRobin(**cut, round_size=6)
    plan = policy.plan(slow, 0)
    first, second = plan.devices
    assert first[:3] == (Op("F", 0, 1, 0), Op("F", 1, 2, 0), Op("F", 0, 2, 1))
    pieces = [(op.first, op.stop) for op in second[:8]]
    assert pieces == [(2, 4), (4, 7), (7, 9), (9, 12), (12, 14), (14, 17), (17, 19), (19, 22)]
    assert second[8] == Op("F", 2, 22, 1)
    stale = replace(policy, optimizer="stale").plan(slow, 0)
    for other in (stale, policy.plan(replace(slow, machine=ideal_machine(2)), 0)):
        assert other.devices[1][0] == Op("F", 2, 22, 0)
    # 20 layers come up in 200 ns, and as long take their forwards: of a piece they are left.
    whole = replace(plan, devices=stale.devices)
    assert [_end_of_first_forward(each, slow) for each in (whole, plan)] == [400, 230]


def _end_of_first_forward(plan: Plan, work: Work) -> int:
    spans = simulate_program(lower([plan], work), "").spans()
    return next(
        span.end_ns for span in spans if (span.kind, span.stop, span.microbatch) == ("F", 22, 0)
    )


def test_a_device_without_a_limit_takes_no_limit_from_another() -> None:
    trace = make_trace(8, param_bytes=100, saved_bytes=50)
    tight = make_machine(2, memory_bytes=520)
    free = tight.devices[0].model_copy(update={"memory_bytes": 0})
    mixed = tight.model_copy(update={"devices": (free, tight.devices[1])})
    cuts = [RoundRobin().cut(Work(trace, machine, 4)) for machine in (tight, mixed)]
    assert cuts[0] == cuts[1]
    assert max((*cuts[1].forward, *cuts[1].backward)) == 2
