"""What holds for every policy with fixed placement, over all small sizes and random costs."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.policies.interleaved_1f1b import Interleaved1F1B, _order
from roundel.policies.lowering import lower
from roundel.policies.plan import Plan
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program

from ..costs import make_work
from .evaluate import Deadlock, busy, evaluate, makespan, most_held
from .small import FIXED, FixedPolicy, name, with_recompute

SIZES = list(product(range(1, 6), range(1, 10)))
POLICIES = pytest.mark.parametrize(
    ("policy", "chunks"), FIXED, ids=[name(policy) for policy, _ in FIXED]
)


@POLICIES
def test_every_small_plan_is_complete_and_runs(policy: FixedPolicy, chunks: int) -> None:
    for devices, microbatches in SIZES:
        work = make_work(devices * chunks, devices, microbatches)
        for variant in with_recompute(policy):
            plan = variant.plan(work, step=0)
            assert_complete(plan, work, recomputes=variant.recompute != "none")
            evaluate(plan, work.op_ns)


@POLICIES
def test_no_device_holds_more_than_the_policy_says(policy: FixedPolicy, chunks: int) -> None:
    for devices, microbatches in SIZES:
        plan = policy.plan(make_work(devices * chunks, devices, microbatches), step=0)
        for rank, ops in enumerate(plan.devices):
            bound = policy.peak_activations(devices, microbatches, rank)
            assert most_held(ops) <= bound
            if policy.name in ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs"):
                assert most_held(ops) == bound


@st.composite
def works(draw: st.DrawFn, chunks: int) -> tuple[Work, tuple[int, ...] | None]:
    """Work with random costs, and a random partition for it or None."""
    devices = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 3), min_size=devices * chunks, max_size=devices * chunks))
    cost = st.integers(0, 40)
    layers = draw(st.lists(st.tuples(cost, cost, cost), min_size=sum(counts), max_size=sum(counts)))
    work = make_work(
        layers, devices, draw(st.integers(1, 9)), recompute_ns=draw(st.integers(0, 20))
    )
    return work, draw(st.sampled_from([tuple(counts), None]))


@POLICIES
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_random_costs_and_cuts(policy: FixedPolicy, chunks: int, data: st.DataObject) -> None:
    work, partition = data.draw(works(chunks))
    hop_ns = data.draw(st.integers(0, 10))
    for variant in with_recompute(replace(policy, partition=partition)):
        plan = variant.plan(work, step=0)
        plan.check(work)
        assert plan == variant.plan(work, step=3)
        spans = evaluate(plan, work.op_ns, hop_ns)
        assert makespan(spans) >= max(busy(spans))
        assert makespan(spans) >= one_microbatch_ns(plan, work, hop_ns)


def one_microbatch_ns(plan: Plan, work: Work, hop_ns: int) -> int:
    """The time of microbatch 0's forward and backward chain, hops included."""
    home = {op.first: device for device, ops in enumerate(plan.devices) for op in ops}
    hops = sum(before != after for before, after in pairwise(home[s] for s in sorted(home)))
    chain = [op for ops in plan.devices for op in ops if op.microbatch == 0 and op.kind in "FBI"]
    return sum(map(work.op_ns, chain)) + 2 * hops * hop_ns


def assert_complete(plan: Plan, work: Work, recomputes: bool) -> None:
    """Every layer and microbatch has one F, one B or one I and one W, and one R if `recomputes`."""
    done = Counter(
        (op.kind, layer, op.microbatch)
        for ops in plan.devices
        for op in ops
        for layer in range(op.first, op.stop)
    )
    split = any(kind == "W" for kind, _, _ in done)
    kinds = "F" + "R" * recomputes + ("IW" if split else "B")
    assert done == Counter(product(kinds, range(work.layers), range(work.microbatches)))


@POLICIES
def test_needed_recomputes_are_the_early_ones_but_those_right_behind_their_forward(
    policy: FixedPolicy, chunks: int
) -> None:
    work, stages = make_work(12, 2, 5), 2 * chunks
    partition = (12 // stages,) * stages
    early, needed = (
        replace(policy, recompute=mode, partition=partition).plan(work, 0)
        for mode in ("early", "needed")
    )
    for all_ops, ops in zip(early.devices, needed.devices, strict=True):
        pairs = zip(all_ops, [None, *all_ops], strict=False)
        left = [op for op, last in pairs if op.kind != "R" or last != op._replace(kind="F")]
        assert list(ops) == left
    full, lean = (evaluate(plan, lambda op: op.stop - op.first) for plan in (early, needed))
    assert makespan(lean) <= makespan(full)
    # What it holds at the most is no more.
    peaks = [
        [curve.peak_bytes for curve in simulate_program(lower([plan], work), "").memory[:-1]]
        for plan in (early, needed)
    ]
    assert all(after <= before for before, after in zip(*peaks, strict=True))


def test_interleaved_1f1b_with_a_shorter_last_round_would_deadlock() -> None:
    """Why rounds get longer instead: 5 devices x 2 chunks, 7 microbatches as 5 and 2."""
    rounds = [range(5), range(5, 7)]
    devices = [
        _order([(rank, rank + 1), (5 + rank, 6 + rank)], "B", rounds, warm_up=2 * (4 - rank) + 5)
        for rank in range(5)
    ]
    with pytest.raises(Deadlock):
        evaluate(Plan(tuple(devices)), lambda op: 1)
    evaluate(Interleaved1F1B().plan(make_work(10, 5, 7), step=0), lambda op: 1)
