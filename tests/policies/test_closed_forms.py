"""Makespans and spans of equal stages against closed forms.

The forms: GPipe and 1F1B from arXiv 1811.06965 and 2006.09503, interleaved 1F1B 2104.04473, looped
BFS 2211.05953, ZB-H1 and ZB-H2 2401.10241, ZB-V 2405.15362.
"""

from itertools import product

import pytest

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.one_f_one_b import OneFOneB
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_h2 import ZBH2
from roundel.policies.zb_v import ZBV

from ..costs import make_work
from .evaluate import Span, evaluate, longest_span, makespan, most_held
from .small import FixedPolicy

COSTS = [(3, 4, 2), (10, 12, 9), (2, 3, 2), (1, 1, 1), (5, 4, 2)]


def spans_of(
    policy: FixedPolicy,
    devices: int,
    microbatches: int,
    cost: tuple[int, int, int],
    chunks: int = 1,
    hop_ns: int = 0,
) -> list[list[Span]]:
    work = make_work([cost] * (devices * chunks), devices, microbatches)
    return evaluate(policy.plan(work, step=0), work.op_ns, hop_ns)


def sizes(least: int) -> list[tuple[int, int]]:
    """Devices, and microbatches from `least` times as many."""
    return [(p, m) for p in range(1, 6) for m in range(max(1, least * p), 4 * p + 1)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("policy", [GPipe(), OneFOneB()], ids=["gpipe", "1f1b"])
def test_gpipe_and_1f1b_idle_for_one_microbatch_a_device(
    policy: FixedPolicy, cost: tuple[int, int, int]
) -> None:
    for devices, microbatches in sizes(least=0):
        spans = spans_of(policy, devices, microbatches, cost)
        assert makespan(spans) == (microbatches + devices - 1) * sum(cost)


def test_latency_reaches_gpipe_once_and_1f1b_every_round() -> None:
    for devices, rounds in product((2, 3, 4, 5), (2, 3)):
        microbatches, ideal = devices * rounds, (devices * rounds + devices - 1) * 900
        gpipe = makespan(spans_of(GPipe(), devices, microbatches, (300, 400, 200), hop_ns=1))
        assert gpipe == ideal + 2 * (devices - 1)
        one_f_one_b = makespan(
            spans_of(OneFOneB(), devices, microbatches, (300, 400, 200), hop_ns=1)
        )
        assert one_f_one_b == ideal + 2 * (devices - 1) * rounds + 2 * (devices - 2)


@pytest.mark.parametrize("policy", [Interleaved1F1B, LoopedBFS])
def test_chunks_divide_the_bubble(policy: type[Interleaved1F1B] | type[LoopedBFS]) -> None:
    for (devices, microbatches), chunks in product(sizes(least=1), (1, 2, 3)):
        spans = spans_of(policy(chunks), devices, microbatches, (3, 4, 2), chunks)
        assert makespan(spans) == (microbatches * chunks + devices - 1) * 9


@pytest.mark.parametrize("policy", [Interleaved1F1B(4), LoopedBFS(4)], ids=["1f1b", "bfs"])
def test_the_anchor_that_six_programs_agree_on(policy: FixedPolicy) -> None:
    assert makespan(spans_of(policy, 64, 256, (1, 1, 1), chunks=4)) == 3261


@pytest.mark.parametrize("cost", COSTS)
def test_zb_h1_idles_for_forward_and_input_less_weight(cost: tuple[int, int, int]) -> None:
    forward, inputs, weights = cost
    for devices, microbatches in sizes(least=1):
        spans = spans_of(ZBH1(), devices, microbatches, cost)
        idle = (devices - 1) * (forward + inputs - weights)
        assert makespan(spans) == microbatches * sum(cost) + idle


@pytest.mark.parametrize("cost", COSTS)
def test_zb_h2_span(cost: tuple[int, int, int]) -> None:
    forward, inputs, weights = cost
    for devices, microbatches in sizes(least=2):
        span = longest_span(spans_of(ZBH2(), devices, microbatches, cost))
        idle = (devices - 1) * (forward + inputs - 2 * weights)
        assert span == microbatches * sum(cost) + idle


def test_zb_h2_of_equal_parts_has_no_bubble_but_the_start() -> None:
    for devices, microbatches in sizes(least=2):
        spans = spans_of(ZBH2(), devices, microbatches, (1, 1, 1))
        assert makespan(spans) == 3 * microbatches + devices - 1
        assert longest_span(spans) == 3 * microbatches


def test_zb_v_of_equal_parts_has_no_bubble_but_the_start() -> None:
    for devices, microbatches in sizes(least=2):
        spans = spans_of(ZBV(), devices, microbatches, (1, 1, 1), chunks=2)
        assert makespan(spans) == 6 * microbatches + devices - 1
        assert longest_span(spans) == 6 * microbatches


def test_zb_v_with_few_microbatches_is_no_longer_than_it_must_be() -> None:
    """PyTorch's order is longer below 2 p - 3 microbatches (38 units, not 33, for 6 and 4)."""
    for devices in range(1, 9):
        for microbatches in range(1, 2 * devices + 2):
            spans = spans_of(ZBV(), devices, microbatches, (1, 1, 1), chunks=2)
            assert makespan(spans) == max(
                6 * microbatches + devices - 1,
                4 * microbatches + 3 * devices - 1,
                2 * microbatches + 4 * devices - 1,
            )


def test_published_peaks() -> None:
    """In a device's share of one microbatch, that is `chunks` stages: p + (p - 1) / v, p, 2 p."""
    assert Interleaved1F1B(4).peak_activations(8, 32, rank=0) == 4 * 8 + 7
    for rank in range(8):
        assert OneFOneB().peak_activations(8, 32, rank) == 8 - rank
        assert ZBH1().peak_activations(8, 32, rank) == 8
        assert ZBH2().peak_activations(8, 32, rank) <= 2 * 8
        assert ZBV().peak_activations(8, 32, rank) == 2 * 8


@pytest.mark.parametrize(
    ("policy", "chunks"), [(ZBH1(), 1), (ZBH2(), 1), (ZBV(), 2)], ids=["h1", "h2", "v"]
)
def test_zero_bubble_peaks_are_reached(policy: FixedPolicy, chunks: int) -> None:
    plan = policy.plan(make_work(4 * chunks, 4, 16), step=0)
    assert max(map(most_held, plan.devices)) == policy.peak_activations(4, 16, rank=0)
