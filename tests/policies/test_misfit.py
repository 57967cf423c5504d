"""What to do about a memory that is too small depends on the plan, and on what fills it."""

import re
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


WHOLE = Plan(((Op("F", 0, 2, 0), Op("R", 0, 2, 0)),))
BY_LAYER = Plan(((Op("F", 0, 2, 0), Op("R", 0, 1, 0)),))
ON_DEVICE = replace(STREAMED, activations="device", optimizer_on="device")
CUT = replace(STREAMED, devices=((Op("F", 0, 2, 0),),))


@pytest.mark.parametrize(
    ("plan", "held", "expected"),
    [
        (Plan(OPS), "saved_activations", "recompute, smaller microbatches, more devices, streamed"),
        (WHOLE, "saved_activations", "recompute of a layer at a time, smaller, more, streamed"),
        (BY_LAYER, "saved_activations", "smaller microbatches, more devices, streamed weights"),
        (Plan(OPS), "optimizer_state", "updates on the host, more devices, streamed weights"),
        (replace(Plan(OPS), optimizer_on="host"), "optimizer_state", "more, streamed"),
        (Plan(OPS), "weights", "more devices, streamed weights"),
        (Plan(OPS), "boundary_gradients", "smaller microbatches, more devices, streamed weights"),
        (Plan(OPS), "workspace", "smaller, the feed-forward parts in chunks, more, streamed"),
        (STREAMED, "weights", "devices with more memory"),
        (CUT, "boundary_activations", "smaller microbatches"),
        (CUT, "optimizer_state", "a finer cut"),
        (CUT, "weights", "a finer cut"),
        (CUT, "saved_activations", "a finer cut, smaller microbatches"),
        (ON_DEVICE, "boundary_activations", "activations on the host, smaller microbatches"),
        (ON_DEVICE, "optimizer_state", "updates on the host"),
        (STREAMED, "boundary_activations", "smaller microbatches"),
    ],
)
def test_on_a_device(plan: Plan, held: str, expected: str) -> None:
    said = re.sub(r" \([^)]*\)", "", advice(plan, curve("gpu0", **{held: 150}))).split(", ")
    wanted = expected.split(", ")
    assert len(said) == len(wanted), said
    assert all(map(str.startswith, said, wanted)), said


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
