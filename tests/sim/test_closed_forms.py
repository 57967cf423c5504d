"""Closed forms for equal stages: p devices, m microbatches, v chunks; F, D, W a chunk, hop c."""

import pytest

import roundel
from roundel.policies.work import Work
from roundel.traces.machine import ideal_machine

from ..costs import make_trace

DEVICES = (1, 2, 3, 4, 8)
MICROBATCHES = (1, 2, 4, 8, 12, 24)


def run(
    policy: roundel.Policy,
    devices: int,
    microbatches: int,
    times: tuple[int, int, int] = (10, 13, 7),
    *,
    chunks: int = 1,
    hop_ns: int = 0,
    **fields: int,
) -> roundel.Simulation:
    trace = make_trace([times] * devices * chunks, **fields)
    work = Work(trace, ideal_machine(devices, hop_ns), microbatches)
    return roundel.api.simulate_work(work, policy)


@pytest.mark.parametrize("policy", [roundel.GPipe(), roundel.OneFOneB()])
@pytest.mark.parametrize("p", DEVICES)
@pytest.mark.parametrize("m", MICROBATCHES)
def test_gpipe_and_1f1b(policy: roundel.Policy, p: int, m: int) -> None:
    metrics = run(policy, p, m).metrics
    assert round(metrics.makespan_s * 1e9) == (m + p - 1) * 30
    assert metrics.bubble_ratio == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("p", DEVICES)
@pytest.mark.parametrize("m", MICROBATCHES)
@pytest.mark.parametrize("c", [1, 3])
def test_gpipe_with_latency(p: int, m: int, c: int) -> None:
    makespan = run(roundel.GPipe(), p, m, hop_ns=c).timeline.makespan_ns
    assert makespan == (m + p - 1) * 30 + 2 * (p - 1) * c


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("c", [1, 2])
def test_1f1b_with_latency(p: int, rounds: int, c: int) -> None:
    m = rounds * p
    # Forward and backward are equally long here; the form holds where neither hides a hop.
    makespan = run(roundel.OneFOneB(), p, m, (10, 12, 8), hop_ns=c).timeline.makespan_ns
    assert makespan == (m + p - 1) * 30 + c * (2 * (p - 1) * m // p + 2 * (p - 2)) or p == 1


@pytest.mark.parametrize("policy", [roundel.Interleaved1F1B, roundel.LoopedBFS])
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("v", [1, 2, 4])
def test_interleaved_and_looped(policy: type, p: int, rounds: int, v: int) -> None:
    m = rounds * p
    metrics = run(policy(chunks=v), p, m, chunks=v).metrics
    assert round(metrics.makespan_s * 1e9) == (m * v + p - 1) * 30
    assert metrics.bubble_ratio == pytest.approx((p - 1) / (m * v + p - 1))


@pytest.mark.parametrize("policy", [roundel.Interleaved1F1B, roundel.LoopedBFS])
def test_anchor_on_which_six_programs_agree(policy: type) -> None:
    assert run(policy(chunks=4), 64, 256, (1, 1, 1), chunks=4).timeline.makespan_ns == 3261


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("times", [(10, 10, 10), (10, 13, 7), (10, 12, 10)])
def test_zb_h1(p: int, times: tuple[int, int, int]) -> None:
    m, (forward, inputs, weights) = 3 * p, times
    metrics = run(roundel.ZBH1(), p, m, times).metrics
    idle = (p - 1) * (forward + inputs - weights)
    assert round(metrics.makespan_s * 1e9) == m * sum(times) + idle
    if forward == inputs == weights:
        assert metrics.bubble_ratio == pytest.approx((p - 1) / (3 * m + p - 1))


@pytest.mark.parametrize("p", [2, 4, 8])
def test_zb_h2_has_no_bubble_in_its_span(p: int) -> None:
    m = 3 * p
    metrics = run(roundel.ZBH2(), p, m, (10, 10, 10)).metrics
    assert metrics.bubble_ratio == pytest.approx((p - 1) / (3 * m + p - 1))
    assert metrics.bubble_ratio_span == pytest.approx(0)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_zb_v(p: int, more: int) -> None:
    m = 2 * p + more
    metrics = run(roundel.ZBV(), p, m, (10, 10, 10), chunks=2).metrics
    assert round(metrics.makespan_s * 1e9) == (6 * m + p - 1) * 10
    assert metrics.bubble_ratio == pytest.approx((p - 1) / (6 * m + p - 1))
    assert metrics.bubble_ratio_span == pytest.approx(0)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("stages", [3, 4, 7])
def test_round_robin_with_equal_visits(n: int, rounds: int, stages: int) -> None:
    m, layers = rounds * n, 2 * stages + 1
    # A forward visit of two layers, a backward visit of one and the head's take 30 ns each.
    trace = make_trace([(15, 9, 6)] * layers)
    work = Work(trace, ideal_machine(n), m)
    visits = stages + layers

    def bubble(recompute: str) -> float:
        policy = roundel.RoundRobin((2,) * stages, (1,) * layers, recompute=recompute)
        return roundel.api.simulate_work(work, policy).metrics.bubble_ratio

    form = n * (n - 1) / (m * visits + n * (n - 1))
    assert bubble("late") == pytest.approx(form)
    assert bubble("early") <= form + 1e-9


ACTIVATIONS = [
    (roundel.GPipe(), 1, lambda p, m, r: m),
    (roundel.OneFOneB(), 1, lambda p, m, r: min(m, p - r)),
    (roundel.LoopedBFS(chunks=2), 2, lambda p, m, r: 2 * m),
    (roundel.ZBH1(), 1, lambda p, m, r: min(m, p)),
    (roundel.ZBH2(), 1, lambda p, m, r: min(m, 2 * p - 1)),
    (roundel.ZBV(), 2, lambda p, m, r: 2 * min(m, p)),
]


@pytest.mark.parametrize(
    ("policy", "chunks", "peak"), ACTIVATIONS, ids=lambda x: getattr(x, "name", "")
)
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("m", [2, 4, 8, 12])
def test_peak_activations(policy: roundel.Policy, chunks: int, peak, p: int, m: int) -> None:
    times = (10, 10, 10)
    curves = run(policy, p, m, times, chunks=chunks, saved_bytes=100).timeline.memory
    held = [curve.peak_bytes // 100 for curve in curves[:-1]]
    bound = [peak(p, m, rank) for rank in range(p)]
    assert all(h <= b for h, b in zip(held, bound, strict=True)), (held, bound)
    if policy.name in ("gpipe", "1f1b", "looped-bfs"):
        assert held == bound


def test_interleaved_holds_what_megatron_says() -> None:
    p, v, m = 4, 2, 8
    curves = run(roundel.Interleaved1F1B(chunks=v), p, m, chunks=v, saved_bytes=100).timeline.memory
    # p + (p - 1) / v in units of a device's share, that is v chunks
    assert curves[0].peak_bytes == 100 * (p * v + p - 1)
