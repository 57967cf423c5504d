"""`roundel import`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import options as opt
from .analysis.units import counted, human_seconds, human_share
from .console import say
from .traces.errors import shown
from .traces.kineto import Imported, import_profile
from .traces.kineto_ranges import LAYERS

_ROWS = 12


def import_trace(
    export: Annotated[
        str,
        typer.Argument(
            metavar="EXPORT",
            help="What torch.profiler's export_chrome_trace wrote (.json or .json.gz).",
        ),
    ],
    tokens: Annotated[
        int,
        typer.Option("--tokens", "-t", help="Tokens a microbatch.", rich_help_panel=opt.WORK),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Write the trace here.", rich_help_panel=opt.OUTPUT),
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="How the names of the layers' ranges begin, a regular expression; without it "
            "layer.N, Block_N and the like.",
            rich_help_panel=opt.WORK,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The trace's name.", rich_help_panel=opt.OUTPUT),
    ] = None,
) -> None:
    """Make a trace from a PyTorch profile: its layers' times, and what belongs to none."""
    imported = import_profile(export, tokens=tokens, layers=layers or LAYERS, name=name)
    imported.trace.save(output)
    print_imported(Console(), imported)
    say(Console(), f"wrote {shown(output)}; next: roundel compare {shown(output)} -d 4 -m 8")


def print_imported(console: Console, imported: Imported) -> None:
    """The layers, the optimizer, what was not assigned, and where the times come from."""
    console.print(_layers_table(imported))
    if imported.unassigned:
        console.print(_unassigned_table(imported))
    for line in _notes(imported):
        say(console, line)


def _layers_table(imported: Imported) -> Table:
    table = _table("layer", "runs", "forward", "backward", "recompute", "spread")
    for cost, times in zip(imported.trace.layers, imported.layers, strict=True):
        table.add_row(
            escape(cost.name),
            str(len(times.forward_ns)),
            human_seconds(cost.forward_ns / 1e9),
            human_seconds(cost.backward_ns / 1e9) if times.backward_ns else "none found",
            "" if cost.recompute_ns is None else human_seconds(cost.recompute_ns / 1e9),
            human_share(times.spread),
        )
    return table


def _unassigned_table(imported: Imported) -> Table:
    table = _table("not assigned", "time", "share")
    for each in imported.unassigned[:_ROWS]:
        table.add_row(
            escape(each.name), human_seconds(each.total_ns / 1e9), human_share(each.share)
        )
    rest = imported.unassigned[_ROWS:]
    if rest:
        ns, share = sum(each.total_ns for each in rest), sum(each.share for each in rest)
        table.add_row(f"{len(rest)} more", human_seconds(ns / 1e9), human_share(share))
    return table


def _notes(imported: Imported) -> list[str]:
    total = imported.total_ns or 1
    shares = [
        f"layers {human_share(imported.assigned_ns / total)}",
        f"optimizer {human_share(imported.optimizer_ns / total)} "
        f"({counted(imported.optimizer_steps, 'step')})",
        f"not assigned {human_share(imported.unassigned_ns / total)}",
    ]
    notes = [f"all work {human_seconds(imported.total_ns / 1e9)}: {', '.join(shares)}"]
    if imported.without_backward:
        names = ", ".join(imported.without_backward)
        notes.append(f"no backward was found for {names}: frozen, or not in the profile?")
    return [*notes, imported.trace.provenance]


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for number, header in enumerate(headers):
        table.add_column(header, no_wrap=number > 0, justify="right" if number else "left")
    return table
