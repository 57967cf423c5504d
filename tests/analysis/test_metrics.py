import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundel.analysis.metrics import Bubble, measure, winner
from roundel.traces.timeline import COMPUTE_KINDS, Lane, Span, Timeline

from .build import ONE_F_ONE_B, build, curve, from_spans


def parts_ns(timeline: Timeline) -> tuple[int, int, int, int]:
    """fill, switch, drain, steady in device-nanoseconds."""
    bubble, whole = measure(timeline).bubble, timeline.devices * timeline.makespan_ns
    shares = (bubble.fill, bubble.switch, bubble.drain, bubble.steady)
    return tuple(round(share * whole) for share in shares)


def one_f_one_b(devices: int, microbatches: int, forward: int, backward: int) -> Timeline:
    """1F1B with equal stages and no transfers, by its definition, without any of our policies."""
    orders = []
    for rank in range(devices):
        warm = min(devices - rank, microbatches)
        ops = [("F", number) for number in range(warm)]
        for number in range(microbatches):
            ops.append(("B", number))
            if warm + number < microbatches:
                ops.append(("F", warm + number))
        orders.append(ops)
    end: dict[tuple[str, int, int], int] = {}
    free, place, spans = [0] * devices, [0] * devices, []
    while any(place[rank] < len(orders[rank]) for rank in range(devices)):
        for rank in range(devices):
            if place[rank] == len(orders[rank]):
                continue
            kind, number = orders[rank][place[rank]]
            if kind == "F":
                need = ("F", number, rank - 1) if rank else None
            else:
                last = rank == devices - 1
                need = ("F", number, rank) if last else ("B", number, rank + 1)
            if need is not None and need not in end:
                continue
            start = max(free[rank], end[need] if need else 0)
            free[rank] = start + (forward if kind == "F" else backward)
            end[kind, number, rank] = free[rank]
            place[rank] += 1
            lane = Lane(rank, "compute")
            spans.append(Span(kind, lane, rank, rank + 1, number, 0, 0, start, free[rank], 0))
    return from_spans(spans)


def test_1f1b_picture():
    metrics = measure(build(ONE_F_ONE_B, unit_ns=1_000_000_000))
    assert metrics.makespan_s == metrics.step_s == 9.0
    assert metrics.bubble_ratio == pytest.approx(1 / 3)
    assert metrics.bubble == Bubble(fill=1 / 18, switch=2 / 18, drain=2 / 18, steady=1 / 18)
    # gpu0 runs from 0 to 9, gpu1 from 1 to 7: the longest is 9, and each is busy for 6.
    assert metrics.bubble_ratio_span == pytest.approx(1 - 6 / 9)
    assert metrics.microbatches_per_s == pytest.approx(2 / 9)
    assert metrics.tokens_per_s == pytest.approx(200 / 9)


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 4, 9])
def test_1f1b_meets_its_closed_form(devices: int, microbatches: int):
    metrics = measure(one_f_one_b(devices, microbatches, forward=300, backward=700))
    closed = (devices - 1) / (microbatches + devices - 1)
    assert metrics.bubble_ratio == pytest.approx(closed)


def test_span_ratio_leaves_out_what_lies_outside_the_longest_device():
    metrics = measure(build("gpu0: F0 F0 B0 B0\n gpu1: . . F0 F0 B0 B0"))
    assert metrics.bubble_ratio == pytest.approx(1 / 3)
    assert metrics.bubble_ratio_span == 0.0


def test_an_idle_device_only_fills():
    assert parts_ns(build("gpu0: F0 B0 \n gpu1: . .")) == (2, 0, 0, 0)


def test_first_gap_of_a_backward_only_device_is_fill():
    assert parts_ns(build("gpu0: F0 . . B0 \n gpu1: . B0 B0 .")) == (1, 2, 1, 0)


@pytest.mark.parametrize("kind", ["B", "I", "W"])
def test_switch_is_only_before_the_first_backward_of_a_step(kind: str):
    assert parts_ns(build(f"gpu0: F0 . {kind}0 . . {kind}1")) == (0, 1, 0, 2)


def test_switch_is_also_before_recomputes_that_wait_for_the_first_gradient():
    assert parts_ns(build("gpu0: F0 . R0 . . B0 . R1 . B1")) == (0, 3, 0, 2)


def test_every_step_has_its_switch():
    assert parts_ns(build("gpu0: F0 . B0 F0' . . B0'")) == (0, 3, 0, 0)


def test_step_boundary_is_split_where_the_step_ends_on_all_devices():
    timeline = build("""
        gpu0: F0 B0 .  .  .  F0' B0'
        gpu1: .  F0 B0 B0 .  .   F0'
    """)
    # Step 0 ends at 4. gpu0 drains 2..4 and fills 4..5; gpu1 fills 0..1 and 4..6.
    assert parts_ns(timeline) == (1 + 1 + 2, 0, 2, 0)


def test_boundary_wins_over_switch_when_the_next_step_starts_backward():
    timeline = build("""
        gpu0: F0 B0 .   .   .   B0'
        gpu1: F0 B0 F0' F0' F0' .
    """)
    assert parts_ns(timeline) == (3, 0, 1, 0)


def test_update_on_the_device_is_busy_and_the_wait_for_it_belongs_to_the_boundary():
    timeline = build("""
        gpu0: F0 B0 .  . update . F0'
        gpu1: F0 B0 B0 . .      . F0'
    """)
    # Step 0's compute ends at 3; the update of gpu0 is work, but no op.
    assert parts_ns(timeline) == (1 + 1 + 3, 0, 1, 0)
    assert measure(timeline).bubble_ratio == pytest.approx(6 / 14)


def test_idle_after_the_last_op_drains_even_when_an_update_follows():
    assert parts_ns(build("gpu0: F0 B0 . . update .\n host optimizer: . . . . . update")) == (
        0,
        0,
        3,
        0,
    )


def test_overlapping_steps_are_no_boundary():
    timeline = build("gpu0: F0 B0 F0' . B1 . . B0'")
    # Step 1 begins before step 0 ends on this device: its gaps are a switch and a steady one.
    assert parts_ns(timeline) == (0, 2, 0, 1)


def test_transfers_and_host_updates_are_no_busy_time():
    timeline = build("""
        gpu0:           F0 B0 .
        gpu0 h2d:       upload upload upload
        host optimizer: update update update
    """)
    assert measure(timeline).bubble_ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ("gpu0: F0 . .", 1),
        ("gpu0: F0 . F0' F0'", 3),
        ("gpu0: F0 . F0' . . F0''", 3),
        ("gpu0: F0 F0' . F0'' F0'' . F0'''", 2.5),
    ],
)
def test_step_time_is_the_pace_of_the_later_half(picture: str, expected: float):
    metrics = measure(build(picture, unit_ns=1_000_000_000))
    assert metrics.step_s == pytest.approx(expected)


def test_step_time_is_no_share_of_the_makespan():
    timeline = build("gpu0: F0 F0' . F0'' . . . F0'''", unit_ns=1_000_000_000)
    assert measure(timeline).step_s == pytest.approx((8 - 2) / 2)


def test_the_host_optimizer_is_in_the_makespan_but_not_in_a_steps_end():
    timeline = build("gpu0: F0 F0' . .\n host optimizer: . update . update'", 1_000_000_000)
    metrics = measure(timeline)
    assert (metrics.makespan_s, metrics.step_s) == (4.0, 1.0)


def test_exposed_transfers_count_on_compute_lanes_and_are_a_mean_over_devices():
    timeline = build("gpu0: F0 . F1 \n gpu1: F0 . F1 \n gpu0 h2d: upload", 1_000_000_000)
    exposed = np.array([0, 1_000_000_000, 0, 500_000_000, 7_000_000_000])
    assert measure(replace(timeline, exposed_ns=exposed)).exposed_transfer_s == 0.75


def test_memory_figures():
    memory = (
        curve("gpu0", {0: 5, 1: 90, 2: 0}, limit=80),
        curve("gpu1", {0: 7}, limit=80),
        curve("host", {0: 1000}),
    )
    metrics = measure(build("gpu0: F0 B0 \n gpu1: F0 B0", memory=memory))
    assert metrics.peak_memory_bytes == (90, 7)
    assert metrics.peak_host_memory_bytes == 1000
    assert not metrics.fits
    assert measure(build("gpu0: F0 \n gpu1: F0")).peak_memory_bytes == (0, 0)


def test_empty_timeline():
    metrics = measure(from_spans([], lanes=(Lane(0, "compute"),)))
    assert (metrics.bubble_ratio, metrics.step_s, metrics.tokens_per_s) == (0.0, 0.0, 0.0)


def test_json_has_the_designs_keys_in_its_order():
    data = measure(build(ONE_F_ONE_B)).to_json("mine")
    assert list(data) == [
        "policy",
        "devices",
        "microbatches",
        "steps",
        "makespan_s",
        "step_s",
        "bubble_ratio",
        "bubble_ratio_span",
        "bubble",
        "exposed_transfer_s",
        "peak_memory_bytes",
        "peak_host_memory_bytes",
        "fits",
        "microbatches_per_s",
        "tokens_per_s",
    ]
    assert list(data["bubble"]) == ["fill", "switch", "drain", "steady"]
    assert json.loads(json.dumps(data)) == data


def test_winner_is_the_fastest_that_fits_and_the_first_of_equals():
    fast = measure(build("gpu0: F0"))
    slow = measure(build("gpu0: F0 F0"))
    too_big = replace(fast, fits=False)
    assert winner({"a": too_big, "b": slow, "c": slow}) == "b"
    assert winner({"a": too_big, "b": slow, "c": fast}) == "c"
    assert winner({"a": too_big}) is None


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Random spans that do not overlap on a lane, in random row order, over a few steps."""
    devices = draw(st.integers(1, 4))
    spans = []
    for device in range(devices):
        cuts = sorted(draw(st.lists(st.integers(0, 60), max_size=20)))
        for start, end in pairwise(cuts):
            if draw(st.booleans()):
                kind = draw(st.sampled_from([*COMPUTE_KINDS, "update", "norm"]))
                step = draw(st.integers(0, 2))
                lane = Lane(device, "compute")
                spans.append(Span(kind, lane, 0, 1, 0, step, 0, start, end, 0))
    host = draw(st.integers(0, 80))
    spans.append(Span("update", Lane(-1, "optimizer"), 0, 1, -1, 0, 0, 0, host, 0))
    return from_spans(draw(st.permutations(spans)), devices=devices)


@given(timelines())
def test_bubble_parts_sum_to_the_ratio(timeline: Timeline):
    metrics = measure(timeline)
    bubble = metrics.bubble
    shares = (bubble.fill, bubble.switch, bubble.drain, bubble.steady)
    whole = timeline.devices * timeline.makespan_ns
    busy = sum(s.end_ns - s.start_ns for s in timeline.spans() if s.lane.kind == "compute")
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(metrics.bubble_ratio, abs=1e-15)
    assert metrics.bubble_ratio == pytest.approx(1 - busy / whole if whole else 0.0)


def slow_parts(timeline: Timeline) -> tuple[int, int, int, int]:
    """The definition of the parts, one gap at a time."""
    ops = set(COMPUTE_KINDS)
    spans = [span for span in timeline.spans() if span.lane.kind == "compute"]
    ends: dict[int, int] = {}
    for span in spans:
        if span.kind in ops:
            ends[span.step] = max(ends.get(span.step, 0), span.end_ns)
    fill = switch = drain = steady = 0
    for device in range(timeline.devices):
        mine = [span for span in spans if span.lane.device == device]
        mine.sort(key=lambda span: span.start_ns)
        busy_until = 0
        for place, span in enumerate(mine):
            gap, idle_from = span.start_ns - busy_until, busy_until
            busy_until = max(busy_until, span.end_ns)
            before = [other for other in mine[:place] if other.kind in ops]
            after = [other for other in mine[place:] if other.kind in ops]
            if gap <= 0:
                continue
            if not before:
                fill += gap
            elif not after:
                drain += gap
            elif after[0].step > before[-1].step and not (
                any(other.step == before[-1].step for other in after)
                or any(other.step == after[0].step for other in before)
            ):
                early = min(max(ends[before[-1].step] - idle_from, 0), gap)
                drain, fill = drain + early, fill + gap - early
            elif span.kind in "RBIW" and not any(
                other.kind in "BIW" and other.step == span.step for other in before
            ):
                switch += gap
            else:
                steady += gap
        tail = timeline.makespan_ns - busy_until
        fill, drain = (fill, drain + tail) if mine else (fill + tail, drain)
    return fill, switch, drain, steady


@given(timelines())
def test_bubble_parts_meet_their_definition(timeline: Timeline):
    assert parts_ns(timeline) == slow_parts(timeline)
