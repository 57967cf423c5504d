"""What would fit where nothing does: shorter samples, or states of fewer bits; simulated."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from .analysis.units import human_bytes
from .api import Simulation, simulate_work
from .policies.policy import Policy
from .policies.work import Work
from .throughput import scaled_trace
from .traces.errors import InputError
from .traces.machine import HOST
from .traces.trace import LayerCost, Trace

SHARES = {"half": Fraction(1, 2), "a quarter": Fraction(1, 4), "an eighth": Fraction(1, 8)}

STATES = {
    "torchao.optim.AdamW8bit": 2.1,
    "roundel.executor.low_bit.AdamW4bit": 1.2,
}
"""Bytes a parameter of optimizers that keep no float32 masters: two moments and their scales."""

UPDATE_BYTES = 24
"""Room that their updates take on a device: bytes a parameter, of a slice at a time."""

MOST = 4
"""Of how many policies it is tried what would have them fit."""


def remedy(
    short_of: set[str],
    work: Work,
    policies: Mapping[str, Policy],
    steps: int,
    say: Callable[[str], None],
) -> str:
    """What would have the first of the policies fit that can be helped; nothing, if none can.

    short_of: names of the memories that are too small. policies: the likeliest ones first. steps:
    to simulate, back to back. Calls `say` before each simulation.
    """
    for what, trace, chosen in _tries(short_of, work.trace, policies):
        for name, policy in list(chosen.items())[:MOST]:
            say(f"simulating {name} {what}")
            try:
                found = simulate_work(replace(work, trace=trace), policy, steps, name)
            except InputError:
                continue
            if found.metrics.fits:
                return f"{what} {name} would fit, in {_needs(found)}"
    return ""


def _tries(
    short_of: set[str], trace: Trace, policies: Mapping[str, Policy]
) -> Iterator[tuple[str, Trace, Mapping[str, Policy]]]:
    if HOST in short_of:
        through = {
            name: each
            for name, each in policies.items()
            if getattr(each, "optimizer_on", None) == "device"
        }
        for optimizer, state in STATES.items():
            layers = tuple(_with_states(each, state) for each in trace.layers)
            if _states(layers) < _states(trace.layers):
                what = f"with --dtype bfloat16 --optim {optimizer}"
                yield what, trace.model_copy(update={"layers": layers}), through
    if short_of - {HOST}:
        for what, share in SHARES.items():
            yield f"with {what} of the tokens in a sample", scaled_trace(trace, share), policies


def _with_states(cost: LayerCost, state: float) -> LayerCost:
    """A layer whose optimizer keeps so many bytes a parameter, and is updated on a device."""
    from .executor.slices import MOST as SLICE

    count = cost.params_to_update
    room = UPDATE_BYTES * min(count, SLICE)
    kept = min(cost.optimizer_bytes, int(state * count))
    return cost.model_copy(update={"optimizer_bytes": kept, "update_workspace_bytes": room})


def _states(layers: Iterable[LayerCost]) -> int:
    return sum(each.optimizer_bytes for each in layers)


def _needs(found: Simulation) -> str:
    """The fullest device's peak and the host's, each of how much there is."""
    *devices, host = found.timeline.memory
    fullest = max(devices, key=lambda each: each.peak_bytes)
    parts = [
        f"{human_bytes(each.peak_bytes)} of {name}'s {human_bytes(each.limit_bytes)}"
        for name, each in ((fullest.name, fullest), ("the host", host))
        if each.limit_bytes
    ]
    return " and ".join(parts)
