"""`roundel published`."""

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import options as opt
from .analysis.throughput_picture import Bar, draw_throughput
from .analysis.units import human_rate, human_seconds
from .console import say
from .throughput import (
    MOST_DEVICES,
    Prediction,
    all_cases,
    assumptions,
    predict,
    published_cases,
)
from .traces.errors import InputError
from .traces.published_throughput import MODELS, System

SYSTEM_NAMES: dict[System, str] = {
    "roundpipe-async": "RoundPipe, asynchronous optimizer",
    "roundpipe-sync": "RoundPipe, synchronous optimizer",
    "megatron-1f1b": "Megatron-LM, 1F1B pipeline",
}


def published(
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            help=f"Names with commas between, of {', '.join(MODELS)}; or all. Without it and "
            "--devices: what has a published figure.",
            rich_help_panel=opt.WORK,
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices", "-d", help='Numbers of GPUs: "8", "1,8", "1..8".', rich_help_panel=opt.WORK
        ),
    ] = None,
    host_rate: Annotated[
        int | None,
        typer.Option(
            "--host-optimizer-rate",
            help="Parameters/s of the host's optimizer, instead of the assumed ones.",
            rich_help_panel=opt.WORK,
        ),
    ] = None,
    plot: opt.Plot = None,
    as_json: opt.Json = False,
) -> None:
    """Predict the throughput that RoundPipe's authors measured, and compare."""
    predictions = [predict(*case, host_rate=host_rate) for case in _cases(models, devices)]
    said = assumptions(host_rate)
    if plot:
        draw_throughput([_bar(each) for each in predictions], plot)
    if as_json:
        rows = [_json(each) for each in predictions]
        print(json.dumps({"rows": rows, "assumptions": said}))
    else:
        _print(Console(), predictions, said)


def _cases(models: str | None, devices: str | None) -> list[tuple[str, System, int]]:
    if models is None and devices is None:
        return published_cases()
    names = list(MODELS) if models in (None, "all") else [n.strip() for n in str(models).split(",")]
    return all_cases(names, _counts(devices or str(MOST_DEVICES)))


def _counts(text: str) -> list[int]:
    """The numbers in "8", "1,8" or "1..8". Raises InputError."""
    counts: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = (first, last if dots else first)
        if not all(end.isdecimal() and 1 <= int(end[:9]) <= MOST_DEVICES for end in ends):
            raise InputError(
                f'--devices: write numbers from 1 to {MOST_DEVICES}, as in "8", "1,8" or "1..8"; '
                f"got {text!r}"
            )
        counts += range(int(ends[0]), int(ends[1]) + 1)
    if not counts:
        raise InputError(f"--devices: {text!r} counts down; write the smaller number first")
    return sorted(set(counts))


def _bar(prediction: Prediction) -> Bar:
    return Bar(
        prediction.model,
        SYSTEM_NAMES[prediction.system],
        prediction.devices,
        prediction.published,
        prediction.tokens_per_s if prediction.fits else None,
    )


def _json(prediction: Prediction) -> dict[str, Any]:
    return {
        "model": prediction.model,
        "devices": prediction.devices,
        "system": prediction.system,
        "sequences_per_step": prediction.split.sequences,
        "microbatches_per_round": prediction.split.microbatches,
        "rounds_per_step": prediction.split.rounds,
        "published_tokens_per_s": prediction.published,
        "predicted_tokens_per_s": prediction.tokens_per_s,
        "error": prediction.error,
        "step_s": prediction.step_s,
        "fits": prediction.fits,
        "cut": prediction.cut,
    }


def _print(console: Console, predictions: list[Prediction], said: list[str]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for header in ("model", "system"):
        table.add_column(header, no_wrap=True)
    for header in ("GPUs", "published\ntokens/s", "predicted\ntokens/s", "error", "step"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in predictions:
        table.add_row(*_cells(each), style="" if each.fits else "red")
    console.print(table)
    console.print("\n[bold]What the predictions rest on[/]")
    for line in said:
        say(console, f"- {line}")


def _cells(each: Prediction) -> tuple[str, ...]:
    return (
        each.model,
        each.system,
        str(each.devices),
        human_rate(each.published) if each.published else "",
        human_rate(each.tokens_per_s) if each.fits else "does not fit",
        "" if each.error is None or not each.fits else f"{100 * each.error:+.1f} %",
        human_seconds(each.step_s) if each.fits else "",
    )
