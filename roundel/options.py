"""The command line's options that several commands share, and how they become policies and work."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .api import make_work
from .executor.sizes import parse_bytes
from .policies.catalog import known_knobs, make_policy, parse_knob
from .policies.plan import Optimizer, Place, Recompute
from .policies.policy import Policy
from .policies.work import Work
from .traces.errors import InputError

WORK, POLICY, OUTPUT = "The work", "The policy's knobs", "Output"

Trace = Annotated[str, typer.Argument(metavar="TRACE", help="A trace file, or a library name.")]
Devices = Annotated[
    int | None,
    typer.Option(
        "--devices",
        "-d",
        help="Number of devices. Without it: all of the machine.",
        rich_help_panel=WORK,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="Of each device, such as 16GiB.", rich_help_panel=WORK),
]
HostMemory = Annotated[
    str | None,
    typer.Option("--host-memory", help="Of the host, such as 128GiB.", rich_help_panel=WORK),
]
Microbatches = Annotated[
    int, typer.Option("--microbatches", "-m", help="Microbatches a step.", rich_help_panel=WORK)
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        "--machine",
        help="A machine file, or a preset's name. Without it: the preset with the trace's GPU, "
        "or one without limits.",
        rich_help_panel=WORK,
    ),
]
HopMs = Annotated[
    float | None,
    typer.Option(
        "--hop-ms",
        help="Replace all links by this constant time between different devices. Without "
        "--machine there are then no memory limits, and updates take no time.",
        rich_help_panel=WORK,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Steps to run back to back. Without it one, or four where a policy is stale.",
        rich_help_panel=WORK,
    ),
]
Partition = Annotated[
    str | None,
    typer.Option(
        "--partition",
        help='Layers per stage, head included: "3 3 4"; for round-robin forward / backward: '
        '"7 7 7 7 / 1 3 3".',
        rich_help_panel=POLICY,
    ),
]
RecomputeOption = Annotated[
    Recompute | None,
    typer.Option(
        "--recompute",
        help="Recompute activations; needed: but none right behind its forward.",
        rich_help_panel=POLICY,
    ),
]
RecomputeLayers = Annotated[
    int | None,
    typer.Option(
        "--recompute-layers",
        min=1,
        help="With --recompute: so many layers at a time, from inputs that are kept; else a "
        "stage at once. Of policies whose weights stay on the devices.",
        rich_help_panel=POLICY,
    ),
]
Chunks = Annotated[
    int | None,
    typer.Option("--chunks", help="Stages per device, interleaved.", rich_help_panel=POLICY),
]
RoundSize = Annotated[
    int | None,
    typer.Option("--round-size", help="Fewest microbatches a round.", rich_help_panel=POLICY),
]
OptimizerOption = Annotated[
    Optimizer | None,
    typer.Option("--optimizer", help="Exact, or one step stale.", rich_help_panel=POLICY),
]
OptimizerOn = Annotated[
    Place | None,
    typer.Option("--optimizer-on", help="Where updates run.", rich_help_panel=POLICY),
]
Activations = Annotated[
    Place | None,
    typer.Option("--activations", help="Where inputs wait for recompute.", rich_help_panel=POLICY),
]
Clip = Annotated[
    bool | None,
    typer.Option("--clip", help="Clip gradients by global norm.", rich_help_panel=POLICY),
]
WeightShare = Annotated[
    float | None,
    typer.Option(
        "--weight-share",
        min=0.0,
        max=1.0,
        help="The weight gradients' part of backward, where the trace has no split.",
        rich_help_panel=POLICY,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, a knob of your own policy.", rich_help_panel=POLICY),
]

Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Write pictures here.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)
]
PolicyName = Annotated[
    str,
    typer.Option("--policy", "-p", help="A policy's name, or file.py:Class.", rich_help_panel=WORK),
]


def work_of(given: Mapping[str, Any]) -> Work:
    """The work that a command's options, by name, describe. Raises InputError."""
    hop_ms = given["hop_ms"]
    if hop_ms is not None and not 0 <= hop_ms <= 1e6:
        raise InputError(f"--hop-ms: must be a time from 0 to 1,000,000 ms, got {hop_ms}")
    hop_ns = None if hop_ms is None else round(hop_ms * 1e6)
    work = make_work(
        given["trace"],
        microbatches=given["microbatches"],
        devices=given["devices"],
        machine=given["machine"],
        hop_ns=hop_ns,
    )
    limits = []
    for name, flag in (("memory", "--memory"), ("host_memory", "--host-memory")):
        limits.append(parse_bytes(given[name], flag))
        if given[name] is not None and not limits[-1]:
            raise InputError(f"{flag}: must be a byte at least, got {given[name]}")
    return replace(work, machine=work.machine.with_memory(*limits))


KNOBS = (
    "recompute",
    "recompute_layers",
    "chunks",
    "round_size",
    "optimizer",
    "optimizer_on",
    "activations",
    "clip",
    "weight_share",
)
"""The knobs that have options of their own names. A partition may be two."""


def knobs_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that were given, by their names in the policies. Raises InputError.

    given: options by name, those of `KNOBS`, `partition`, and `own`, which is what `--set` has;
    None is not given, and others do not matter.
    """
    options = {name: given[name] for name in KNOBS if given.get(name) is not None}
    options |= _parse_partition(given.get("partition"))
    own = _parse_own(given.get("own") or [])
    for knob in options.keys() & own.keys():
        raise InputError(f"{_flag(knob)} and --set {knob}: give one of them")
    return options | own


def policies_of(names: list[str], knobs: dict[str, Any]) -> list[Policy]:
    """Policies by name, each with those of the knobs that it has.

    Raises InputError for a knob that none of them has.
    """
    unused, theirs = set(knobs), dict[str, None]()
    policies = []
    for name in names:
        known = known_knobs(name)
        theirs |= dict.fromkeys(known)
        mine = {knob: value for knob, value in knobs.items() if knob in known}
        unused -= set(mine)
        policies.append(make_policy(name, **mine))
    if unused:
        raise InputError(
            f"{', '.join(map(_flag, sorted(unused)))}: no policy among {', '.join(names)} has "
            f"this; their knobs are {', '.join(theirs) or 'none'}"
        )
    return policies


def _flag(knob: str) -> str:
    if knob == "backward_partition":
        return "--partition with a cut after /"
    return f"--{knob.replace('_', '-')}" if knob in (*KNOBS, "partition") else f"--set {knob}"


def _parse_partition(text: str | None) -> dict[str, tuple[int, ...]]:
    if text is None:
        return {}
    parts = [part.replace(",", " ").split() for part in text.split("/")]
    if len(parts) > 2 or not all(word.isdecimal() for part in parts for word in part):
        raise InputError(
            f'--partition: not a partition: {text!r}; write layer counts, as in "3 3 4" '
            f'or, forward / backward, "7 7 7 7 / 1 3 3"'
        )
    counts = [tuple(map(int, part)) for part in parts]
    names = ("partition", "backward_partition")
    return dict(zip(names, counts, strict=False))


def _parse_own(pairs: list[str]) -> dict[str, Any]:
    try:
        return dict(map(parse_knob, pairs))
    except InputError as error:
        raise InputError(f"--set: {error}") from None
