"""Policy `auto`: every policy of the library on what was measured here; the winner trains."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from . import report
from .analysis.units import human_bytes
from .api import Comparison, simulate_work
from .policies.catalog import POLICIES, known_knobs, make_policy
from .policies.misfit import misfit
from .policies.policy import Policy, policy_name
from .policies.streamed import Streamed
from .policies.work import Work
from .remedies import Given, remedy
from .traces.errors import InputError
from .traces.machine import HOST

STEPS = 3
"""Steps to simulate: a policy's steady step may differ from its first."""

MOST_ROWS = 10
"""Candidates that are in the table; there may be forty."""

WEIGHT_SHARE = 0.5
"""The weight gradients' part of backward: of a linear layer's two products there, one."""

RECOMPUTE: dict[str, dict[str, Any]] = {
    "": {"recompute": "none"},
    ", recompute": {"recompute": "needed"},
    ", recompute by layer": {"recompute": "needed", "recompute_layers": 1},
    ", recompute all by layer": {"recompute": "early", "recompute_layers": 1},
}
"""Ways to recompute of policies whose weights stay on the devices; 1F1B's last needs least room."""


class NothingFits(InputError):
    """No policy fits the memory."""


def microbatch_counts(fewest: int, batch: int) -> list[int]:
    """How many microbatches to try, one after the other, until something fits: twice as many."""
    counts = [fewest]
    while counts[-1] < batch:
        counts.append(min(2 * counts[-1], batch))
    return counts


def candidates(knobs: dict[str, Any], microbatches: int) -> dict[str, Policy]:
    """Every policy with and without recompute, with those of the knobs that it has, by a name.

    Of those that stream weights also such that keep things in other places, or take all of a
    step's microbatches in one round, or both. Raises InputError for a knob that none of them has.
    """
    every = {knob for name in POLICIES for knob in known_knobs(name)}
    unknown = sorted(set(knobs) - every)
    if unknown:
        raise InputError(f"{', '.join(unknown)}: no policy of the library has this")
    wanted = {"weight_share": WEIGHT_SHARE, **knobs}
    made: dict[str, Policy] = {}
    for name in POLICIES:
        mine = {knob: value for knob, value in wanted.items() if knob in known_knobs(name)}
        if issubclass(POLICIES[name], Streamed):
            made |= _streamed(name, mine, knobs, microbatches)
            continue
        for title, way in RECOMPUTE.items():
            each = {**way, **mine}
            if each["recompute"] == "none":
                each.pop("recompute_layers", None)
            policy = make_policy(name, **each)
            if policy not in made.values():
                made[f"{name}{title}"] = policy
    return made


def _streamed(
    name: str, mine: dict[str, Any], knobs: dict[str, Any], microbatches: int
) -> dict[str, Policy]:
    """A policy as it is, and with any of the knobs that were not given set to another value."""
    # What is streamed cannot keep what forward saved, but where its first backward visit does.
    if mine.get("recompute") == "none":
        return {}
    base = {"recompute": "early", **mine}
    every: dict[str, dict[str, Any]] = {
        "one round": {"round_size": microbatches},
        "activations on the device": {"activations": "device"},
        "states through the device": {"optimizer_on": "device"},
    }
    free = {
        title: each
        for title, each in every.items()
        if not each.keys() & knobs.keys() and each.keys() <= set(known_knobs(name))
    }
    made = {}
    for count in range(len(free) + 1):
        for titles in combinations(free, count):
            others = {knob: value for title in titles for knob, value in free[title].items()}
            made[", ".join((name, *titles))] = make_policy(name, **base | others)
    return made


def choose(
    work: Work,
    policies: Mapping[str, Policy],
    console: Console,
    say: Callable[[str], None],
    last: bool = True,
    given: Given = Given(),  # noqa: B008
) -> Policy:
    """The fastest of the policies that fits the memory, itself. Prints the table.

    Of policies whose plans are the same only the first is simulated, as of two that stream weights
    to one device. Raises NothingFits, or InputError where more microbatches would be of no use;
    where this is the `last` that is tried they say what would fit, by simulation.
    """
    simulations, refused, known = [], {}, set()
    for name, policy in policies.items():
        say(f"simulating {name}")
        try:
            plans = tuple(policy.plan(work, step) for step in range(STEPS))
            if plans not in known:
                known.add(plans)
                simulations.append(simulate_work(work, policy, STEPS, name))
        except InputError as error:
            refused[name] = str(error)
    comparison = Comparison(tuple(simulations), refused)
    report.print_comparison(console, comparison, [], misfits=False, rows=MOST_ROWS)
    if comparison.winner is None:
        raise _no_winner(comparison, work, say, last, given)
    return _with_its_cut(comparison.winner, work)


def _with_its_cut(policy: Policy, work: Work) -> Policy:
    """The policy with the cut that it was simulated with, which it is not to look for again."""
    if not isinstance(policy, Streamed):
        return policy
    cut = policy.cut(work)
    return replace(policy, partition=cut.forward, backward_partition=cut.backward)


def _no_winner(
    comparison: Comparison,
    work: Work,
    say: Callable[[str], None],
    last: bool,
    given: Given,
) -> InputError:
    """What the nearest policies would need to fit, what to do about it, and what would."""
    worst = [
        (max(each.timeline.memory, key=lambda curve: curve.over_share), each)
        for each in comparison.simulations
    ]
    if not worst:
        return InputError(f"policy auto: none can run: {next(iter(comparison.refused.values()))}")
    ways = {"with weights on the devices": False, "with weights on the host": True}
    said, short_of = [], set()
    for where, streams in ways.items():
        mine = [each for each in worst if isinstance(each[1].policy, Streamed) == streams]
        if mine:
            curve, nearest = min(mine, key=lambda each: each[0].over_share)
            plan = nearest.policy.plan(nearest.work, 0)
            said.append(f"{where}, {nearest.name}: {misfit(curve, plan, human_bytes)}")
            short_of.add(curve.name)
    # More microbatches leave the host as much to hold.
    kind = InputError if short_of == {HOST} else NothingFits
    if last or kind is InputError:
        nearest_first = sorted(worst, key=lambda each: each[0].over_share)
        likeliest = {each.name: each.policy for _, each in nearest_first}
        would = remedy(short_of, work, likeliest, STEPS, say, given)
        said[-1] += f"; by simulation {would}" if would else ""
    return kind(f"policy auto: none fits the memory; the nearest, {'; or '.join(said)}")


def save_choice(policy: Policy, microbatches: int, path: Path, about: dict[str, Any]) -> None:
    """Write down a policy of the library, so that a run that goes on takes the same."""
    knobs = {knob: getattr(policy, knob) for knob in known_knobs(type(policy))}
    chosen = {"policy": policy_name(policy), "knobs": knobs, "microbatches": microbatches}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**chosen, "about": about}) + "\n", encoding="utf-8")


def load_choice(path: Path, about: dict[str, Any]) -> tuple[Policy, int] | None:
    """The policy and microbatches that were written down for the same devices and memory, if any.

    `about`: what the choice depends on; also the microbatches, where they were asked for.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["about"] != about:
            return None
        knobs = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data["knobs"].items()
        }
        return make_policy(data["policy"], **knobs), int(data["microbatches"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
