"""What to do about a memory that is too small depends on the plan, and on what fills it."""

from dataclasses import replace

import numpy as np
import pytest

from roundel.policies.misfit import misfit
from roundel.policies.op import Op
from roundel.policies.plan import Plan
from roundel.traces.timeline import MemoryCurve

OPS = ((Op("F", 0, 1, 0), Op("B", 0, 1, 0)),)
STREAMED = Plan(OPS, weights="streamed", optimizer_on="host", activations="host")


def curve(name: str, **held: int) -> MemoryCurve:
    nothing = np.zeros(1, dtype=np.int64)
    holders = tuple((what.replace("_", " "), nbytes) for what, nbytes in held.items())
    return MemoryCurve(name, 100, nothing, nothing, sum(held.values()), 0, holders)


def advice(plan: Plan, memory: MemoryCurve) -> str:
    said, _, advised = misfit(memory, plan, str).partition("; use ")
    assert said.startswith(f"{memory.name} would need {memory.peak_bytes} of 100 (")
    return advised


@pytest.mark.parametrize(
    ("plan", "words", "others"),
    [
        (Plan(OPS), ["recompute", "streamed weights"], ["finer cut", "host"]),
        (Plan(((Op("F", 0, 2, 0), Op("R", 0, 2, 0)),)), ["a finer cut"], ["recompute"]),
        (STREAMED, ["shorter sequences"], ["finer cut", "streamed weights", "on the host"]),
        (replace(STREAMED, activations="device"), ["activations on the host"], ["optimizer_on"]),
        (replace(STREAMED, optimizer_on="device"), ["optimizer_on host"], ["activations on"]),
    ],
)
def test_on_a_device(plan: Plan, words: list[str], others: list[str]) -> None:
    advised = advice(plan, curve("gpu0", weights=150))
    assert all(each in advised for each in words)
    assert not any(each in advised for each in others)


@pytest.mark.parametrize(
    ("plan", "held", "words", "others"),
    [
        (STREAMED, {"optimizer_state": 90, "weights": 30}, ["fewer bits"], ["optimizer_on"]),
        (STREAMED, {"gradients": 90, "optimizer_state": 5}, ["optimizer_on device"], ["bits"]),
        (replace(STREAMED, optimizer="stale"), {"weights": 150}, ["synchronous"], ["resident"]),
        (STREAMED, {"weights": 150}, ["resident weights"], ["synchronous"]),
        (STREAMED, {"boundary_activations": 150}, ["fewer samples a step"], ["bits"]),
        (replace(STREAMED, optimizer_on="device"), {"gradients": 150}, ["more host"], ["bits"]),
    ],
)
def test_on_the_host(plan: Plan, held: dict[str, int], words: list[str], others: list[str]) -> None:
    advised = advice(plan, curve("host", **held))
    assert all(each in advised for each in words)
    assert not any(each in advised for each in others)
