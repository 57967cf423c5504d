"""What must hold for every policy on any work: random costs, cuts, machines and steps."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import roundel
from roundel.analysis.metrics import measure
from roundel.policies.lowering import lower_policy
from roundel.policies.program import Program
from roundel.policies.streamed import Streamed
from roundel.policies.work import Work
from roundel.sim.engine import simulate_program
from roundel.traces.errors import InputError
from roundel.traces.machine import Machine, ideal_machine
from roundel.traces.timeline import Timeline
from roundel.traces.trace import LayerCost, Trace

from ..costs import make_machine
from ..policies.evaluate import evaluate, makespan

small_bytes = st.sampled_from([0, 1, 7, 100])
times_ns = st.integers(0, 60)


@st.composite
def layer_costs(draw: st.DrawFn) -> LayerCost:
    inputs, weights = draw(times_ns), draw(times_ns)
    fields = ("param_bytes", "grad_bytes", "optimizer_bytes", "output_bytes", "saved_bytes")
    return LayerCost(
        name="layer",
        forward_ns=draw(times_ns),
        backward_ns=inputs + weights,
        backward_input_ns=inputs,
        backward_weight_ns=weights,
        workspace_bytes=draw(small_bytes),
        **{field: draw(small_bytes) for field in fields},
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    devices = draw(st.integers(1, 4))
    if draw(st.booleans()):
        return ideal_machine(devices, draw(st.sampled_from([0, 1, 5])))
    return make_machine(
        devices,
        host_bytes_per_s=draw(st.sampled_from([0, 10**8, 10**9])),
        params_per_s=draw(st.sampled_from([0, 10**9])),
        latency_ns=draw(st.sampled_from([0, 3])),
    )


@st.composite
def works(draw: st.DrawFn) -> Work:
    layers = tuple(draw(st.lists(layer_costs(), min_size=8, max_size=10)))
    trace = Trace(name="t", device="d", provenance="p", microbatch_tokens=1, layers=layers)
    return Work(trace, draw(machines()), draw(st.integers(1, 9)))


@st.composite
def policies(draw: st.DrawFn) -> roundel.Policy:
    policy = roundel.make_policy(draw(st.sampled_from(list(roundel.POLICIES))))
    places = st.sampled_from(["device", "host"])
    recompute = ["early", "late"] if isinstance(policy, Streamed) else ["none", "early", "late"]
    policy = replace(policy, recompute=draw(st.sampled_from(recompute)), optimizer_on=draw(places))
    if isinstance(policy, Streamed):
        stale = draw(st.sampled_from(["sync", "stale"]))
        policy = replace(policy, optimizer=stale, activations=draw(places))
    streamed_on_device = isinstance(policy, Streamed) and policy.optimizer_on == "device"
    return replace(policy, clip=not streamed_on_device and draw(st.booleans()))


def run(policy: roundel.Policy, work: Work, steps: int) -> tuple[Program, Timeline]:
    program = lower_policy(policy, work, steps)
    return program, simulate_program(program, "test")


@settings(max_examples=150, deadline=None)
@given(policies(), works(), st.integers(1, 3))
def test_every_timeline_is_possible(policy: roundel.Policy, work: Work, steps: int) -> None:
    program, timeline = run(policy, work, steps)
    start, end = timeline.start_ns, timeline.end_ns
    assert (start >= 0).all()
    assert (end[program.dep_before] <= start[program.dep_after]).all()
    for lane in range(len(program.lanes)):
        tasks = program.tasks_of(lane)
        assert (end[tasks[:-1]] <= start[tasks[1:]]).all()
    stays = program.source == program.target
    assert ((end - start)[stays] == program.duration_ns[stays]).all()
    assert sorted(program.lane_tasks.tolist()) == list(range(len(program)))


@settings(max_examples=150, deadline=None)
@given(policies(), works(), st.integers(1, 3))
def test_memory_is_given_back(policy: roundel.Policy, work: Work, steps: int) -> None:
    program, timeline = run(policy, work, steps)
    buffers = program.buffers
    kept = np.setdiff1d(np.arange(len(buffers.nbytes)), buffers.use_buffer)
    assert (buffers.alloc[kept] == -1).all(), "only what is held from the start is never freed"
    assert (buffers.nbytes > 0).all()
    for pool, curve in enumerate(timeline.memory):
        assert (curve.used_bytes >= 0).all()
        mine = kept[buffers.pool[kept] == pool]
        last = int(curve.used_bytes[-1])
        assert last == buffers.nbytes[mine].sum()
        assert curve.peak_bytes == curve.used_bytes.max(initial=0)
    ready = timeline.start_ns[program.buffers.alloc]
    before = program.buffers.alloc[program.buffers.use_buffer]
    held = before >= 0
    assert (
        ready[program.buffers.use_buffer][held] <= timeline.end_ns[program.buffers.use_task][held]
    ).all(), "nothing is used before it is there"


@settings(max_examples=150, deadline=None)
@given(policies(), works(), st.integers(1, 3))
def test_no_schedule_beats_the_obvious_bounds(
    policy: roundel.Policy, work: Work, steps: int
) -> None:
    _, timeline = run(policy, work, steps)
    metrics = measure(timeline)
    layers = work.trace.layers
    once = sum(layer.forward_ns + layer.backward_ns for layer in layers)
    # The chain of one microbatch: a W, where backward is split, need not be in it.
    split = policy.name.startswith("zb")
    weights = sum(layer.backward_weight_ns or 0 for layer in layers) if split else 0
    assert timeline.makespan_ns >= once - weights
    assert timeline.makespan_ns * work.devices >= once * work.microbatches * steps
    parts = metrics.bubble
    total = parts.fill + parts.switch + parts.drain + parts.steady
    assert total == pytest.approx(metrics.bubble_ratio, abs=1e-12)
    assert 0 <= metrics.bubble_ratio <= 1
    assert -1e-12 <= metrics.bubble_ratio_span <= metrics.bubble_ratio + 1e-12
    assert 0 <= metrics.exposed_transfer_s <= timeline.makespan_ns / 1e9


@settings(max_examples=50, deadline=None)
@given(policies(), works(), st.integers(1, 3))
def test_the_same_twice(policy: roundel.Policy, work: Work, steps: int) -> None:
    (program, first), (again, second) = run(policy, work, steps), run(policy, work, steps)
    assert (program.lane_tasks == again.lane_tasks).all()
    assert (first.start_ns == second.start_ns).all()
    assert (first.end_ns == second.end_ns).all()


@settings(max_examples=150, deadline=None)
@given(policies(), works(), st.integers(0, 1))
def test_the_same_times_as_an_evaluator_of_a_few_lines(
    policy: roundel.Policy, work: Work, hop_ns: int
) -> None:
    slow = tuple(
        layer.model_copy(
            update={
                "forward_ns": layer.forward_ns + 1,
                "backward_ns": layer.backward_ns + 2,
                "backward_input_ns": layer.backward_input_ns + 1,
                "backward_weight_ns": layer.backward_weight_ns + 1,
            }
        )
        for layer in work.trace.layers
    )
    # With every op as long as a hop, sends do not queue, which the evaluator does not know;
    # unless an op has two, one of them for a recompute elsewhere. Nor does it know gradients that
    # are sent to the device that updates.
    if isinstance(policy, Streamed):
        policy = replace(policy, activations="host", optimizer_on="host")
    work = Work(
        work.trace.model_copy(update={"layers": slow}),
        ideal_machine(work.devices, hop_ns),
        work.microbatches,
    )
    plan = policy.plan(work, 0)
    expected = makespan(evaluate(plan, lambda op: work.op_ns(op), hop_ns))
    assert run(policy, work, 1)[1].makespan_ns == expected


def test_a_policy_without_room_says_so() -> None:
    work = Work(roundel.load_trace("qwen3-1.7b-rtx4090"), ideal_machine(30), 4)
    with pytest.raises(InputError, match=r"30 stages .* the trace has 29"):
        lower_policy(roundel.GPipe(), work)
