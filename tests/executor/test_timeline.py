"""The timeline of a real step: the simulator's type, its order, and all that works on it."""

import json
from pathlib import Path

import pytest
from torch import nn

import roundel
from roundel.analysis.chrome import write_chrome_trace
from roundel.analysis.metrics import measure
from roundel.analysis.timeline_picture import draw_pair, draw_timeline
from roundel.executor.trainer import Trainer
from roundel.policies.lowering import lower
from roundel.policies.streamed import Streamed
from roundel.sim.engine import simulate_program
from roundel.traces.timeline import Timeline

from . import toy

mse = nn.functional.mse_loss


def make(policy: roundel.Policy, devices: int, microbatches: int) -> Trainer:
    return Trainer(
        toy.blocks(),
        mse,
        policy=policy,
        optimizer=toy.ADAMW,
        devices=toy.devices(devices),
        microbatches=microbatches,
    )


def one_step(policy: roundel.Policy, steps: int = 1) -> tuple[Timeline, Timeline]:
    """A measured step and the same step simulated."""
    with make(policy, 3, 4) as trainer:
        for batch in toy.vectors(steps=steps):
            result = trainer.step(*batch)
        measured = result.timeline
        assert trainer._ready is not None
        work = trainer._ready.work
    plan = policy.plan(work, steps - 1)
    return measured, simulate_program(lower([plan], work), "simulated")


def orders(timeline: Timeline) -> dict[str, list[tuple]]:
    """What ran on each lane, in the order of the starts."""
    rows: dict[str, list[tuple]] = {}
    spans = sorted(enumerate(timeline.spans()), key=lambda pair: (pair[1].start_ns, pair[0]))
    for _, span in spans:
        name = (span.kind, span.first, span.stop, span.microbatch, span.nbytes)
        rows.setdefault(span.lane.name, []).append(name)
    return rows


POLICIES = [
    *toy.every_policy(recompute="early"),
    *toy.every_policy(optimizer_on="host", recompute="none"),
    *(
        each
        for each in toy.every_policy(recompute="needed", recompute_layers=1)
        if not isinstance(each, Streamed)
    ),
    roundel.RoundRobin(**toy.CUTS, optimizer_on="device"),
    roundel.RoundRobin(**toy.CUTS, optimizer="stale", activations="device", recompute="late"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_executed_order_is_simulated_order(policy: roundel.Policy) -> None:
    measured, simulated = one_step(policy)
    compute = [name for name in orders(measured) if name.endswith("compute")]
    assert len(compute) == 3
    # Tasks without duration may share a start in the simulation: there the lane's order counts.
    for lane, tasks in orders(measured).items():
        assert sorted(tasks) == sorted(orders(simulated)[lane])
        if lane.endswith("compute"):
            assert tasks == orders(simulated)[lane]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_measured_timeline_keeps_lanes_and_dependencies(policy: roundel.Policy) -> None:
    measured, _ = one_step(policy, steps=2)
    assert measured.source == "measured"
    assert (measured.end_ns >= measured.start_ns).all()
    last: dict[int, int] = {}
    order = sorted(range(len(measured)), key=lambda row: int(measured.start_ns[row]))
    for row in order:
        lane = int(measured.lane[row])
        assert measured.start_ns[row] >= last.get(lane, 0)
        last[lane] = int(measured.end_ns[row])


def test_every_picture_and_export_works_on_it(tmp_path: Path) -> None:
    measured, simulated = one_step(roundel.RoundRobin(**toy.CUTS))
    draw_timeline(measured, tmp_path / "step.png")
    draw_pair(simulated, measured, tmp_path / "pair.png")
    write_chrome_trace(measured, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    metrics = measure(measured)
    assert 0 <= metrics.bubble_ratio < 1
    assert max(metrics.peak_memory_bytes) > 0


def test_the_largest_microbatch_is_measured_and_every_sample_counts() -> None:
    with make(roundel.GPipe(), 2, 4) as trainer:
        result = trainer.step(*toy.vectors(size=7)[0])  # In parts of 1, 2, 2 and 2.
        assert trainer.trace is not None
        assert trainer.trace.microbatch_tokens == 2
    assert result.tokens_per_s == pytest.approx(7 / (result.timeline.makespan_ns / 1e9))


def test_tokens_per_second_are_those_of_the_whole_step() -> None:
    with make(roundel.GPipe(), 2, 2) as trainer:
        result = trainer.step(*toy.vectors(size=10)[0])
    seconds = result.timeline.makespan_ns / 1e9
    assert result.tokens_per_s == pytest.approx(10 / seconds)


def test_how_the_host_kept_up_with_each_op() -> None:
    """On the CPU an op takes as long as its launch and ends behind it; a GPU has its own time."""
    with make(roundel.RoundRobin(**toy.CUTS), 2, 3) as trainer:
        result = trainer.step(*toy.vectors()[0])
        spans = [each for each in result.timeline.spans() if each.lane.kind == "compute"]
        launches = result.launches
    assert [each.kind for each in launches] == [
        span.kind for span in sorted(spans, key=lambda span: (span.lane.name, span.start_ns))
    ]
    by_lane = sorted(spans, key=lambda span: (span.lane.name, span.start_ns))
    for launch, span in zip(launches, by_lane, strict=True):
        assert launch.lane == span.lane.name
        assert launch.host_ns > 0
        if toy.DEVICES == ["cpu"]:
            assert launch.host_ns <= span.end_ns - span.start_ns
            assert launch.lead_ns > 0
        assert launch.lead_ns < span.end_ns
