"""Every policy's order as its paper draws it; `2F0` is the forward of stage 2 for microbatch 0."""

import pytest

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.one_f_one_b import OneFOneB
from roundel.policies.policy import Policy
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_h2 import ZBH2
from roundel.policies.zb_v import ZBV

from ..costs import make_work


def picture(policy: Policy, stages: int, devices: int, microbatches: int) -> list[str]:
    """A line of ops per device, for stages of one layer each."""
    plan = policy.plan(make_work(stages, devices, microbatches), step=0)
    return [" ".join(f"{op.first}{op.kind}{op.microbatch}" for op in ops) for ops in plan.devices]


def test_gpipe() -> None:
    assert picture(GPipe(), 3, 3, 4) == [
        "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3",
        "1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3",
        "2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3",
    ]


def test_1f1b() -> None:
    assert picture(OneFOneB(), 4, 4, 6) == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0B3 0B4 0B5",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1B4 1B5",
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2B5",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5",
    ]


def test_1f1b_with_fewer_microbatches_than_devices() -> None:
    assert picture(OneFOneB(), 3, 3, 2) == [
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B0 1B1",
        "2F0 2B0 2F1 2B1",
    ]


def test_interleaved_1f1b() -> None:
    assert picture(Interleaved1F1B(), 4, 2, 4) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_interleaved_1f1b_with_a_longer_round() -> None:
    assert picture(Interleaved1F1B(), 4, 2, 3) == [
        "0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2",
        "1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2",
    ]


def test_looped_bfs() -> None:
    assert picture(LoopedBFS(), 4, 2, 3) == [
        "0F0 0F1 0F2 2F0 2F1 2F2 2B0 2B1 2B2 0B0 0B1 0B2",
        "1F0 1F1 1F2 3F0 3F1 3F2 3B0 3B1 3B2 1B0 1B1 1B2",
    ]


def test_zb_h1() -> None:
    assert picture(ZBH1(), 4, 4, 6) == [
        "0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0F5 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5",
        "1F0 1F1 1F2 1I0 1F3 1I1 1W0 1F4 1I2 1W1 1F5 1I3 1W2 1I4 1W3 1I5 1W4 1W5",
        "2F0 2F1 2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2F5 2I4 2W2 2I5 2W3 2W4 2W5",
        "3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3F5 3I5 3W2 3W3 3W4 3W5",
    ]


def test_zb_h2() -> None:
    assert picture(ZBH2(), 3, 3, 6) == [
        "0F0 0F1 0F2 0F3 0F4 0I0 0W0 0F5 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5",
        "1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1F5 1I3 1W1 1I4 1W2 1I5 1W3 1W4 1W5",
        "2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2F5 2I5 2W1 2W2 2W3 2W4 2W5",
    ]


def test_zb_v() -> None:
    assert picture(ZBV(), 4, 2, 4) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 "
        "0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3",
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 "
        "2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3",
    ]


def test_zb_v_with_one_microbatch_puts_w_where_a_device_waits() -> None:
    assert picture(ZBV(), 4, 2, 1) == [
        "0F0 3F0 3I0 3W0 0I0 0W0",
        "1F0 2F0 2I0 1I0 2W0 1W0",
    ]


@pytest.mark.parametrize("recompute", ["early", "late"])
def test_a_recompute_comes_right_before_its_backward(recompute: str) -> None:
    plan = OneFOneB(recompute=recompute).plan(make_work(2, 2, 2), step=0)  # type: ignore[arg-type]
    assert plan.late_recompute == (recompute == "late")
    assert picture(OneFOneB(recompute="early"), 2, 2, 2) == [
        "0F0 0F1 0R0 0B0 0R1 0B1",
        "1F0 1R0 1B0 1F1 1R1 1B1",
    ]
    assert picture(ZBH1(recompute="early"), 2, 2, 2) == [
        "0F0 0F1 0R0 0I0 0W0 0R1 0I1 0W1",
        "1F0 1R0 1I0 1F1 1R1 1I1 1W0 1W1",
    ]
    assert picture(ZBV(recompute="early"), 2, 1, 1) == ["0F0 1F0 1R0 1I0 1W0 0R0 0I0 0W0"]


def test_where_it_is_needed_a_recompute_does_not_come_right_behind_its_forward() -> None:
    assert picture(OneFOneB(recompute="needed"), 2, 2, 2) == [
        "0F0 0F1 0R0 0B0 0R1 0B1",
        "1F0 1B0 1F1 1B1",
    ]
    assert picture(ZBH1(recompute="needed"), 2, 2, 2) == [
        "0F0 0F1 0R0 0I0 0W0 0R1 0I1 0W1",
        "1F0 1I0 1F1 1I1 1W0 1W1",
    ]
    assert picture(GPipe(recompute="needed"), 2, 2, 2) == [
        "0F0 0F1 0R0 0B0 0R1 0B1",
        "1F0 1F1 1R0 1B0 1R1 1B1",
    ]


def test_layers_follow_the_partition_and_its_placement() -> None:
    work = make_work(7, 2, 1)
    bounds = [
        [(op.first, op.stop) for op in ops if op.kind == "F"]
        for ops in ZBV(partition=(1, 3, 1, 2)).plan(work, step=0).devices
    ]
    assert bounds == [[(0, 1), (5, 7)], [(1, 4), (4, 5)]]
