"""What would fit where nothing does: more microbatches, shorter samples, or states of fewer bits;
simulated."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from .analysis.units import human_bytes
from .api import Simulation, simulate_work
from .policies.policy import Policy
from .policies.work import Work
from .throughput import scaled_trace
from .traces.errors import InputError
from .traces.machine import HOST
from .traces.trace import LayerCost

SHARES = {"half": Fraction(1, 2), "a quarter": Fraction(1, 4), "an eighth": Fraction(1, 8)}

LOW_BIT = "roundel.executor.low_bit"

EIGHT_BIT = 2.1
STATES = {"AdamW8bit": EIGHT_BIT, "AdamW4bit": 1.2}
"""Bytes a parameter of optimizers that keep no float32 masters: two moments and their scales. Of
embedding and head the second has eight bits, too."""

UPDATE_BYTES = 24
"""Room that their updates take on a device: bytes a parameter, of a slice at a time."""

MOST = 4
"""Of how many policies it is tried what would have them fit."""


@dataclass(frozen=True)
class Given:
    """What is known of a training beyond its work.

    samples: in a microbatch, so that there may be so many times as many microbatches. autocast:
    activations have fewer bits than weights already.
    """

    samples: int = 1
    autocast: bool = False


Policies = Mapping[str, Policy]


def remedy(
    short_of: set[str],
    work: Work,
    policies: Policies,
    steps: int,
    say: Callable[[str], None],
    given: Given = Given(),
) -> str:
    """What would have the first of the policies fit that can be helped; nothing, if none can.

    short_of: names of the memories that are too small. policies: the likeliest ones first. steps:
    to simulate, back to back. Calls `say` before each simulation.
    """
    for what, tried, chosen in _tries(short_of, work, policies, given):
        for name, policy in list(chosen.items())[:MOST]:
            say(f"simulating {name} {what}")
            try:
                found = simulate_work(tried, policy, steps, name)
            except InputError:
                continue
            if found.metrics.fits:
                return f"{what} {name} would fit, in {_needs(found)}"
    return ""


def _tries(
    short_of: set[str], work: Work, policies: Policies, given: Given
) -> Iterator[tuple[str, Work, Policies]]:
    states = list(_of_fewer_bits(work, given)) if HOST in short_of else []
    through = {
        name: each
        for name, each in policies.items()
        if getattr(each, "optimizer_on", None) == "device"
    }
    for what, tried in states:
        yield what, tried, through
    if short_of - {HOST}:
        for what, tried in _smaller(work, given):
            yield what, tried, policies
        for few, fewer in states:
            for what, tried in _smaller(fewer, given):
                yield f"{few} and {what}", tried, through


def _smaller(work: Work, given: Given) -> Iterator[tuple[str, Work]]:
    """Microbatches of fewer tokens: of fewer samples, or of shorter ones."""
    for share in SHARES.values():
        if share.denominator <= given.samples:
            count = work.microbatches * share.denominator
            yield (
                f"with {count} microbatches",
                replace(work, trace=scaled_trace(work.trace, share), microbatches=count),
            )
    for what, share in SHARES.items():
        yield (
            f"with {what} of the tokens in a sample",
            replace(work, trace=scaled_trace(work.trace, share)),
        )


def _of_fewer_bits(work: Work, given: Given) -> Iterator[tuple[str, Work]]:
    """Weights of two bytes, and states of few bits."""
    layers = work.trace.layers
    if _is_float32(layers):
        layers = tuple(_narrowed(each, given.autocast) for each in layers)
    for optimizer, state in STATES.items():
        ends = {0, len(layers) - 1}
        made = tuple(
            _with_states(each, EIGHT_BIT if number in ends else state)
            for number, each in enumerate(layers)
        )
        if _states(made) < _states(work.trace.layers):
            trace = work.trace.model_copy(update={"layers": made})
            what = f"with --dtype bfloat16 --optim {LOW_BIT}.{optimizer}"
            yield what, replace(work, trace=trace)


def _is_float32(layers: Iterable[LayerCost]) -> bool:
    """Whether layers compute with weights of four bytes, all of which are trained."""
    trained = [each for each in layers if each.params_to_update]
    held = sum(each.param_bytes for each in trained)
    count = sum(each.params_to_update for each in trained)
    return 3.9 * count < held < 4.1 * count


def _narrowed(cost: LayerCost, autocast: bool) -> LayerCost:
    """A layer of half the bits; its activations', too, where they have not got fewer already."""
    wide = ["param_bytes", "grad_bytes"]
    wide += [] if autocast else ["output_bytes", "saved_bytes", "workspace_bytes"]
    return cost.model_copy(update={name: -(-getattr(cost, name) // 2) for name in wide})


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
