"""What a plan that needs more memory than there is would need, and what to do about it."""

from collections.abc import Callable, Iterator

from ..traces.machine import HOST
from ..traces.timeline import MemoryCurve
from .plan import Plan

Size = Callable[[int], str]


def misfit(curve: MemoryCurve, plan: Plan, size: Size) -> str:
    """One line on a memory that is too small for a plan; `size` writes a number of bytes."""
    holders = ", ".join(f"{what} {size(nbytes)}" for what, nbytes in curve.holders)
    advice = _for_the_host(curve, plan) if curve.name == HOST else _for_a_device(curve, plan)
    return (
        f"{curve.name} would need {size(curve.peak_bytes)} of {size(curve.limit_bytes)} "
        f"({holders}); use {', '.join(advice)}"
    )


def _for_a_device(curve: MemoryCurve, plan: Plan) -> list[str]:
    own = _streamed(curve, plan) if plan.weights == "streamed" else _resident(curve, plan)
    advice = list(own)
    if any(_holds(curve, each) for each in (*_ACTIVATIONS, "workspace")):
        advice.append("smaller microbatches (more of them, fewer samples or shorter sequences)")
    if _holds(curve, "workspace"):
        advice.append("the feed-forward parts in chunks (--ffn-chunk, of a preset)")
    if plan.weights == "resident":
        advice += ["more devices", "streamed weights (round-robin)"]
    return advice or ["devices with more memory"]


def _resident(curve: MemoryCurve, plan: Plan) -> Iterator[str]:
    recomputed = [op for device in plan.devices for op in device if op.kind == "R"]
    if _holds(curve, "saved activations"):
        if not recomputed:
            yield "recompute"
        elif any(op.stop - op.first > 1 for op in recomputed):
            yield "recompute of a layer at a time (recompute_layers 1)"
    if plan.optimizer_on == "device" and _holds(curve, "optimizer state"):
        yield "updates on the host (optimizer_on host)"


def _streamed(curve: MemoryCurve, plan: Plan) -> Iterator[str]:
    can_be_cut = any(op.stop - op.first > 1 for device in plan.devices for op in device)
    # Between more stages there are more boundaries.
    if can_be_cut and _held(curve, _OF_A_STAGE) > _held(curve, _BOUNDARIES):
        yield "a finer cut"
    if plan.activations == "device" and _holds(curve, "boundary activations"):
        yield "activations on the host"
    if plan.optimizer_on == "device" and _holds(curve, "optimizer state"):
        yield "updates on the host (optimizer_on host)"


_BOUNDARIES = ("boundary activations", "boundary gradients")
_ACTIVATIONS = ("saved activations", *_BOUNDARIES)

_OF_A_STAGE = ("weights", "gradients", "optimizer state", "saved activations")

_LARGE = 0.1
"""What holds a smaller part of a memory than this is not worth advice."""


def _for_the_host(curve: MemoryCurve, plan: Plan) -> list[str]:
    every = {
        "optimizer state": "states of fewer bits (roundel.executor.low_bit.AdamW8bit or "
        "AdamW4bit, with bf16 weights), LoRA",
        "gradients": "updates on the device, which keep up (optimizer_on device)",
        "boundary activations": "fewer samples a step, whose boundary activations wait there",
        "weights": "resident weights on more devices",
    }
    if plan.optimizer == "stale":
        every["weights"] = "a synchronous optimizer, which needs one copy of the weights less"
    if plan.optimizer_on == "device":
        every.pop("gradients")
    return [advice for what, advice in every.items() if _holds(curve, what)] or ["more host memory"]


def _held(curve: MemoryCurve, what: tuple[str, ...]) -> int:
    return sum(size for name, size in curve.holders if name in what)


def _holds(curve: MemoryCurve, what: str) -> bool:
    """Whether something holds so much of a memory that less of it would help."""
    return _held(curve, (what,)) > _LARGE * curve.peak_bytes
