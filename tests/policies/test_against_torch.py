"""PyTorch's own orders as an oracle where the schedule is the same, without a process group.

Left out: PyTorch's description of 1F1B (its last rank starts `F1 B0`, which its own validator
refuses). Its looped BFS, and its ZB-V with few microbatches, differ from ours on purpose.
"""

import re
from itertools import product
from typing import Any

import pytest

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_v import ZBV

from ..costs import make_work
from .small import FixedPolicy

schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")

SIZES = list(product(range(1, 6), range(1, 12)))


def theirs(kind: str, devices: int, microbatches: int, chunks: int) -> list[list[str]]:
    """The compute actions of a PyTorch schedule, rank by rank."""
    schedule = object.__new__(getattr(schedules, kind))
    rounds = max(1, microbatches // devices)
    vars(schedule).update(
        pp_group_size=devices,
        n_local_stages=chunks,
        num_stages=devices * chunks,
        _num_stages=devices * chunks,
        _stages=[None] * chunks,
        _n_microbatches=microbatches,
        microbatches_per_round=microbatches // rounds,
    )
    if kind == "ScheduleGPipe":
        ranks = schedule._get_pipeline_order().values()
    else:
        ranks = [schedule._calculate_single_rank_operations(rank) for rank in range(devices)]
    names = [[str(action) for action in actions if action is not None] for actions in ranks]
    return [[name for name in own if re.fullmatch(r"\d+[FIWB]\d+", name)] for own in names]


def ours(policy: FixedPolicy, devices: int, microbatches: int, chunks: int) -> list[list[str]]:
    plan = policy.plan(make_work(devices * chunks, devices, microbatches), step=0)
    return [[f"{op.first}{op.kind}{op.microbatch}" for op in ops] for ops in plan.devices]


def test_gpipe() -> None:
    for size in SIZES:
        assert ours(GPipe(), *size, 1) == theirs("ScheduleGPipe", *size, 1)


def test_interleaved_1f1b_where_torch_allows_the_microbatches() -> None:
    for (devices, microbatches), chunks in product(SIZES, (1, 2, 3)):
        if microbatches % max(1, microbatches // devices) == 0:
            size = devices, microbatches, chunks
            assert ours(Interleaved1F1B(chunks), *size) == theirs("ScheduleInterleaved1F1B", *size)


def test_looped_bfs_but_for_the_microbatches_of_backward() -> None:
    """PyTorch takes the microbatches of backward in reverse; ours go in order, as GPipe's do."""
    for (devices, microbatches), chunks in product(SIZES, (1, 2, 3)):
        for mine, other in zip(
            ours(LoopedBFS(chunks), devices, microbatches, chunks),
            theirs("ScheduleLoopedBFS", devices, microbatches, chunks),
            strict=True,
        ):
            half = chunks * microbatches
            assert mine[:half] == other[:half]
            for first in range(half, 2 * half, microbatches):
                assert (
                    mine[first : first + microbatches] == other[first : first + microbatches][::-1]
                )


def test_zb_h1_is_zb1p_of_one_chunk() -> None:
    for size in SIZES:
        assert ours(ZBH1(), *size, 1) == theirs("ScheduleInterleavedZeroBubble", *size, 1)


def test_zb_v_from_twice_the_devices_less_one() -> None:
    """With fewer microbatches ours is shorter: W runs where a device would wait."""
    for devices, microbatches in SIZES:
        mine = ours(ZBV(), devices, microbatches, 2)
        other = theirs("ScheduleZBVZeroBubble", devices, microbatches, 2)
        if microbatches >= 2 * devices - 1:
            assert mine == other
        else:
            assert [without_weights(ops) for ops in mine] == [without_weights(o) for o in other]


def without_weights(ops: list[str]) -> list[str]:
    return [op for op in ops if "W" not in op]
