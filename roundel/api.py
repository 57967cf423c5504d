"""simulate and compare: what policies would do on a machine, and which is best."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path

from .analysis.metrics import Metrics, measure, winner
from .policies.catalog import make_policy
from .policies.lowering import lower_policy
from .policies.plan import Plan
from .policies.planning import plan_of
from .policies.policy import Policy, policy_name
from .policies.work import Work, whole_number
from .sim.engine import simulate_program
from .traces.errors import InputError
from .traces.library import load_machine, load_trace, preset_for
from .traces.machine import Machine, ideal_machine
from .traces.timeline import Timeline
from .traces.trace import Trace

MOST_DEVICES = 4096
MOST_STEPS = 10_000
MOST_HOP_NS = 10**12


STEADY_STEPS = 4
"""Steps back to back that show the time of one which outlasts its end, as of a stale policy: its
updates fall into the next step, and in a single one there is none to hide them."""


@dataclass(frozen=True)
class Simulation:
    """What one policy would do: its timeline, and the figures of it."""

    name: str
    policy: Policy
    work: Work
    timeline: Timeline

    @cached_property
    def metrics(self) -> Metrics:
        """Step time, bubbles, memory and throughput."""
        return measure(self.timeline)

    def plan(self, step: int = 0) -> Plan:
        """The policy's plan of one step of this work."""
        return plan_of(self.policy, self.work, step)


@dataclass(frozen=True)
class Comparison:
    """Policies on the same work. `refused` says of each policy that cannot run why not."""

    simulations: tuple[Simulation, ...]
    refused: dict[str, str]

    @property
    def ranking(self) -> tuple[Simulation, ...]:
        """The simulations, fastest step first; those that do not fit the memory come last."""
        return tuple(
            sorted(self.simulations, key=lambda each: (not each.metrics.fits, each.metrics.step_s))
        )

    @property
    def best(self) -> Simulation | None:
        """The fastest simulation that fits the memory, or None when none does."""
        name = winner({each.name: each.metrics for each in self.simulations})
        return next((each for each in self.simulations if each.name == name), None)

    @property
    def winner(self) -> Policy | None:
        """The fastest policy that fits the memory, unchanged, or None when none does."""
        return self.best.policy if self.best else None


def make_work(
    trace: Trace | str | Path,
    *,
    microbatches: int,
    devices: int | None = None,
    machine: Machine | str | Path | None = None,
    hop_ns: int | None = None,
) -> Work:
    """What to plan for: a trace (or its name or file) on so many devices of a machine.

    Without a machine: the preset with the trace's GPU if there is one with enough devices, else
    one without limits whose transfers and updates take no time; with `hop_ns` always the latter.
    Without `devices`: all that the machine or preset has.
    `hop_ns` replaces all link costs by a constant between different devices.
    Raises InputError for anything that is not there or does not fit together.
    """
    if devices is not None:
        whole_number("devices", devices, MOST_DEVICES)
    if hop_ns is not None and (type(hop_ns) is not int or not 0 <= hop_ns <= MOST_HOP_NS):
        raise InputError(f"hop_ns: must be whole nanoseconds up to {MOST_HOP_NS}, got {hop_ns!r}")
    loaded = trace if isinstance(trace, Trace) else load_trace(trace)
    return Work(loaded, _machine(loaded, devices, machine, hop_ns), microbatches)


def _machine(
    trace: Trace, devices: int | None, machine: Machine | str | Path | None, hop_ns: int | None
) -> Machine:
    if machine is None:
        preset = preset_for(trace.device, devices) if hop_ns is None else None
        if preset is not None:
            return preset
        if devices is None:
            raise InputError("devices: give their number (--devices), or a machine (--machine)")
        return ideal_machine(devices, hop_ns or 0)
    chosen = machine if isinstance(machine, Machine) else load_machine(machine)
    chosen = chosen if devices is None else chosen.first_devices(devices)
    return chosen if hop_ns is None else chosen.with_hop(hop_ns)


def simulate(
    trace: Trace | str | Path,
    policy: Policy | str = "round-robin",
    *,
    microbatches: int,
    devices: int | None = None,
    machine: Machine | str | Path | None = None,
    hop_ns: int | None = None,
    steps: int | None = None,
) -> Simulation:
    """Simulate `steps` steps, back to back, of a policy (an object, a name or `file.py:Class`).

    steps: None is one, or `STEADY_STEPS` of a policy that works one step stale. See `make_work` for
    the other arguments. Raises InputError.
    """
    work = make_work(
        trace, microbatches=microbatches, devices=devices, machine=machine, hop_ns=hop_ns
    )
    return simulate_work(work, policy, steps)


def simulate_work(
    work: Work, policy: Policy | str, steps: int | None = None, name: str | None = None
) -> Simulation:
    """Simulate a policy on work that is already made, under its own or another name.

    Raises InputError.
    """
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    steps = _steps(steps, work, [chosen])
    name = name or policy_name(chosen)
    timeline = simulate_program(lower_policy(chosen, work, steps), name)
    return Simulation(name, chosen, work, timeline)


def compare(
    trace: Trace | str | Path,
    policies: Iterable[Policy | str],
    *,
    microbatches: int,
    devices: int | None = None,
    machine: Machine | str | Path | None = None,
    hop_ns: int | None = None,
    steps: int | None = None,
) -> Comparison:
    """Simulate several policies on the same work. `compare(...).winner` is the best one.

    steps: as for `simulate`, so many of all where one is stale. See `make_work` for the other
    arguments. Raises InputError where the work is wrong or there is no policy; one that cannot
    run it is not an error but `refused`.
    """
    work = make_work(
        trace, microbatches=microbatches, devices=devices, machine=machine, hop_ns=hop_ns
    )
    return compare_work(work, tuple(policies), steps)


def compare_work(
    work: Work,
    policies: Sequence[Policy | str],
    steps: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Simulate several policies on work that is already made, calling `progress` before each.

    Raises InputError where there is none.
    """
    chosen = [make_policy(each) if isinstance(each, str) else each for each in policies]
    if not chosen:
        raise InputError("policies: name at least one")
    steps = _steps(steps, work, chosen)
    simulations, refused = [], {}
    for name, policy in zip(_names(chosen), chosen, strict=True):
        progress(name)
        try:
            simulations.append(simulate_work(work, policy, steps, name))
        except InputError as error:
            refused[name] = str(error)
    return Comparison(tuple(simulations), refused)


def _steps(steps: int | None, work: Work, policies: Sequence[Policy]) -> int:
    if steps is None:
        return STEADY_STEPS if any(_is_stale(each, work) for each in policies) else 1
    whole_number("steps", steps, MOST_STEPS)
    return steps


def _is_stale(policy: Policy, work: Work) -> bool:
    """As its knob says, or where it has none, its plan. One that cannot plan will say so later."""
    if hasattr(policy, "optimizer"):
        return bool(policy.optimizer == "stale")
    try:
        return plan_of(policy, work, 0).optimizer == "stale"
    except InputError:
        return False


def _names(policies: Sequence[Policy]) -> list[str]:
    """A name each: where several have the same, with the knobs that were set, and numbered."""
    plain = [policy_name(policy) for policy in policies]
    names: list[str] = []
    for name, policy in zip(plain, policies, strict=True):
        full = full_name(policy) if plain.count(name) > 1 else name
        number = sum(other.partition(" #")[0] == full for other in names) + 1
        names.append(full if number == 1 else f"{full} #{number}")
    return names


def full_name(policy: Policy) -> str:
    """A policy's name with the knobs that were set, as in "1f1b (recompute=early)"."""
    name = policy_name(policy)
    if not is_dataclass(policy):
        return name
    changed = [
        f"{field.name}={getattr(policy, field.name)}"
        for field in fields(policy)
        if field.init and getattr(policy, field.name) != field.default
    ]
    return f"{name} ({', '.join(changed)})" if changed else name
