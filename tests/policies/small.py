"""The policies with fixed placement, and how many stages a device each of them has."""

from collections.abc import Iterator
from dataclasses import replace

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.one_f_one_b import OneFOneB
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_h2 import ZBH2
from roundel.policies.zb_v import ZBV

FixedPolicy = GPipe | OneFOneB | Interleaved1F1B | LoopedBFS | ZBH1 | ZBH2 | ZBV

FIXED: list[tuple[FixedPolicy, int]] = [
    (GPipe(), 1),
    (OneFOneB(), 1),
    *((Interleaved1F1B(chunks), chunks) for chunks in (1, 2, 3)),
    *((LoopedBFS(chunks), chunks) for chunks in (1, 2, 3)),
    (ZBH1(), 1),
    (ZBH2(), 1),
    (ZBV(), 2),
]


def name(policy: FixedPolicy) -> str:
    chunks = getattr(policy, "chunks", "")
    return f"{policy.name}{chunks}"


def with_recompute(policy: FixedPolicy) -> Iterator[FixedPolicy]:
    """The policy in the recompute modes that recompute nothing or all."""
    yield policy
    yield replace(policy, recompute="early")
    yield replace(policy, recompute="late")
