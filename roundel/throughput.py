"""Predicted tokens a second of systems whose real training was published, from layer times."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice, pairwise

from .api import Simulation, simulate_work
from .megatron import megatron_trace
from .policies.one_f_one_b import OneFOneB
from .policies.round_robin import RoundRobin
from .policies.work import Work, whole_number
from .traces.errors import InputError
from .traces.library import load_machine, load_trace
from .traces.machine import Machine
from .traces.published_throughput import (
    PUBLISHED,
    SEQUENCE,
    SYSTEMS,
    Split,
    System,
    published_row,
    split_of,
)
from .traces.trace import LayerCost, Trace

MACHINE = "8x-rtx4090"
MOST_DEVICES = 8
STEPS = 4
FUSED_BYTES, UNFUSED_BYTES = 30, 92
CUTS_TRIED = 8
SCALED = (
    *(name for name in LayerCost.model_fields if name.endswith("_ns")),
    *("output_bytes", "saved_bytes", "workspace_bytes"),
)
LIKELY_MICROBATCHES = 4
MOST_HOST_RATE = 2**53

ASSUMPTIONS = (
    f"machine: preset {MACHINE}; its links and memories are nominal, not measured there",
    "roundpipe: the published times of one layer, measured for 4 sequences, in proportion to the "
    "microbatch's tokens; every microbatch has the average size; embedding, kernel launches and "
    "the host's sums of gradients over rounds take no time",
    "roundpipe: our own best cut that fits; theirs in these runs is not published",
    f"roundpipe: host AdamW moves {UNFUSED_BYTES} bytes a parameter (unfused, an operation at a "
    "time) at half the memory's peak: {rate} parameters/s (--host-optimizer-rate)",
    "roundpipe: one optimizer call a step, which begins when all gradients are on the host, as "
    "with clipping by the global norm; asynchronous: one step stale",
    "megatron: 1F1B, all layers recomputed, one GPU a stage, optimizer on the GPUs; float32 "
    "gradients (18 bytes a parameter in all)",
    "megatron: matrix products added up in float32, its default, which GeForce cards do at half "
    "the rate of the published layer times; so layer times are computed (roundel analytic), not "
    "published ones",
    "megatron: a loss in float32, an operation at a time, 52 bytes a logit",
    "megatron: as many layers in every middle stage, first and last may differ, which is what its "
    "flags allow; the fastest such cut that fits",
    "a step cut as published for that model and system, on any number of GPUs; where it is not "
    "published, as for the model's other mode, else 64 sequences in one round of 16",
)


@dataclass(frozen=True)
class Prediction:
    """One predicted throughput, beside the published one where there is one.

    `fits`: whether every memory's limit is kept; the figure of what does not fit is of no use.
    """

    model: str
    devices: int
    system: System
    split: Split
    published: float | None
    tokens_per_s: float
    step_s: float
    fits: bool
    cut: str

    @property
    def error(self) -> float | None:
        """Predicted over published, less 1."""
        return self.tokens_per_s / self.published - 1 if self.published else None


def published_cases() -> list[tuple[str, System, int]]:
    """(model, system, devices) of each published figure."""
    return [(row.model, row.system, row.devices) for row in PUBLISHED]


def all_cases(models: list[str], devices: list[int]) -> list[tuple[str, System, int]]:
    """(model, system, devices) of every system on each number of GPUs."""
    return [(model, system, count) for model in models for count in devices for system in SYSTEMS]


def predict(
    model: str, system: System, devices: int, host_rate: int | None = None, one_call: bool = True
) -> Prediction:
    """The throughput of `system` training `model` on so many RTX 4090s, from 1 to 8.

    `host_rate` are parameters/s of the host's optimizer, None for the assumed ones; `one_call`
    False lets a layer's update begin when its own gradients are there. Raises InputError.
    """
    row = published_row(model, system, devices)
    machine = host_machine(devices, host_rate)
    split = split_of(model, system)
    if system == "megatron-1f1b":
        simulation, cut = _megatron(model, split, machine)
    else:
        simulation, cut = _roundpipe(model, system, split, machine, one_call)
    step_s = simulation.metrics.step_s
    tokens_per_s = split.sequences * SEQUENCE / step_s
    published = row.tokens_per_s if row else None
    fits = simulation.metrics.fits
    return Prediction(model, devices, system, split, published, tokens_per_s, step_s, fits, cut)


def host_machine(devices: int, host_rate: int | None = None) -> Machine:
    """The preset with so many GPUs and the assumed, or the given, host optimizer.

    Raises InputError for a number of GPUs that it does not have, or a rate out of range.
    """
    whole_number("devices", devices, MOST_DEVICES)
    machine = load_machine(MACHINE).first_devices(devices)
    if host_rate is None:
        host_rate = machine.host.optimizer_params_per_s * FUSED_BYTES // UNFUSED_BYTES
    elif not 1 <= host_rate <= MOST_HOST_RATE:
        raise InputError(f"--host-optimizer-rate: must be at least 1 a second, got {host_rate}")
    # Gradients of several rounds may be added up while others still come down: no time for that.
    rates = {"optimizer_params_per_s": host_rate, "sum_params_per_s": 0}
    host = machine.host.model_copy(update=rates)
    return machine.model_copy(update={"host": host})


def assumptions(host_rate: int | None = None) -> list[str]:
    """What a prediction rests on, a line each."""
    rate = host_machine(1, host_rate).host.optimizer_params_per_s
    return [line.replace("{rate}", f"{rate / 1e9:.3g}e9") for line in ASSUMPTIONS]


def scaled_trace(trace: Trace, factor: Fraction) -> Trace:
    """`trace` for microbatches of `factor` times the tokens: times, activations in proportion."""
    layers = []
    for layer in trace.layers:
        values = {name: getattr(layer, name) for name in SCALED}
        scaled = {name: round(n * factor) for name, n in values.items() if n is not None}
        layers.append(layer.model_copy(update=scaled))
    tokens = round(trace.microbatch_tokens * factor)
    return trace.model_copy(update={"layers": tuple(layers), "microbatch_tokens": tokens})


def _roundpipe(
    model: str, system: System, split: Split, machine: Machine, one_call: bool
) -> tuple[Simulation, str]:
    trace = load_trace(f"{model}-rtx4090")
    factor = split.per_microbatch * SEQUENCE / trace.microbatch_tokens
    work = Work(scaled_trace(trace, factor), machine, split.microbatches * split.rounds)
    policy = RoundRobin(
        round_size=split.microbatches,
        optimizer="stale" if system == "roundpipe-async" else "sync",
        clip=one_call,
    )
    return simulate_work(work, policy, STEPS), str(policy.cut(work))


def _megatron(model: str, split: Split, machine: Machine) -> tuple[Simulation, str]:
    trace = megatron_trace(model, split.per_microbatch)
    work = Work(trace, machine, split.microbatches * split.rounds)
    short = Work(trace, machine, min(work.microbatches, LIKELY_MICROBATCHES * work.devices))
    policies = [_one_f_one_b(cut) for cut in islice(megatron_cuts(work), CUTS_TRIED)]
    fitting = (each for each in policies if simulate_work(short, each, 1).metrics.fits)
    policy = next(fitting, policies[0])
    assert policy.partition is not None
    return simulate_work(work, policy, STEPS), " ".join(map(str, policy.partition))


def _one_f_one_b(cut: tuple[int, ...]) -> OneFOneB:
    return OneFOneB(partition=cut, recompute="late", clip=True)


def megatron_cuts(work: Work) -> Iterator[tuple[int, ...]]:
    """Cuts with equal middle stages, the fastest first; the head is in the last stage."""
    ends = list(accumulate(work.together_ns("FRB"), initial=0))
    cuts = _equal_middles(work.layers - 1, work.devices)
    yield from sorted(cuts, key=lambda cut: (_slowest(cut, ends), cut))


def _equal_middles(blocks: int, devices: int) -> Iterator[tuple[int, ...]]:
    """Layers a stage, the head counted in the last one."""
    if devices == 1:
        yield (blocks + 1,)
    elif devices == 2:
        yield from ((first, blocks - first + 1) for first in range(1, blocks))
    else:
        middles = devices - 2
        for size in range(1, blocks // middles + 1):
            ends = blocks - middles * size
            yield from ((a, *(size,) * middles, ends - a + 1) for a in range(1, ends))


def _slowest(cut: tuple[int, ...], ends: list[int]) -> int:
    bounds = accumulate(cut, initial=0)
    return max(ends[stop] - ends[first] for first, stop in pairwise(bounds))
