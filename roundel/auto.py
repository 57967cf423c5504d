"""Policy `auto`: every policy of the library on what was measured here; the winner trains."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from . import report
from .api import Comparison, simulate_work
from .policies.catalog import POLICIES, known_knobs, make_policy
from .policies.plan import Recompute
from .policies.policy import Policy, policy_name
from .policies.round_robin import RoundRobin
from .policies.work import Work
from .traces.errors import InputError

STEPS = 3
"""Steps to simulate: a policy's steady step may differ from its first."""

WEIGHT_SHARE = 0.5
"""The weight gradients' part of backward: of a linear layer's two products there, one."""

RECOMPUTE: tuple[Recompute, ...] = ("none", "early")


def candidates(knobs: dict[str, Any]) -> dict[str, Policy]:
    """Every policy with and without recompute, with those of the knobs that it has, by a name.

    Raises InputError for a knob that none of them has.
    """
    every = {knob for name in POLICIES for knob in known_knobs(name)}
    unknown = sorted(set(knobs) - every)
    if unknown:
        raise InputError(f"{', '.join(unknown)}: no policy of the library has this")
    wanted = {"weight_share": WEIGHT_SHARE, **knobs}
    modes = [knobs["recompute"]] if "recompute" in knobs else RECOMPUTE
    made = {}
    for name, kind in POLICIES.items():
        mine = {knob: value for knob, value in wanted.items() if knob in known_knobs(name)}
        for mode in modes:
            # What is streamed cannot keep what forward saved.
            if mode != "none" or kind is not RoundRobin:
                title = name if mode == "none" or kind is RoundRobin else f"{name}, recompute"
                made[title] = make_policy(name, **{**mine, "recompute": mode})
    return made


def choose(
    work: Work, policies: Mapping[str, Policy], console: Console, say: Callable[[str], None]
) -> Policy:
    """The fastest of the policies that fits the memory, itself. Prints the table."""
    simulations, refused = [], {}
    for name, policy in policies.items():
        say(f"simulating {name}")
        try:
            simulations.append(simulate_work(work, policy, STEPS, name))
        except InputError as error:
            refused[name] = str(error)
    comparison = Comparison(tuple(simulations), refused)
    report.print_comparison(console, comparison, [])
    if comparison.winner is None:
        raise InputError(
            "policy auto: none fits the memory; use more memory, more microbatches or shorter "
            "sequences"
        )
    return comparison.winner


def save_choice(policy: Policy, path: Path, about: dict[str, Any]) -> None:
    """Write down a policy of the library, so that a run that goes on takes the same."""
    knobs = {knob: getattr(policy, knob) for knob in known_knobs(type(policy))}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"policy": policy_name(policy), "knobs": knobs, **about})
    path.write_text(text + "\n", encoding="utf-8")


def load_choice(path: Path, about: dict[str, Any]) -> Policy | None:
    """The policy that was written down for the same devices and microbatches, if there is one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if {name: data[name] for name in about} != about:
            return None
        knobs = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data["knobs"].items()
        }
        return make_policy(data["policy"], **knobs)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
