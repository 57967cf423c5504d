"""`roundel analytic`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options as opt
from .analysis.units import human_bytes, human_seconds
from .console import say
from .traces.analytic import Efficiency, analytic_trace
from .traces.errors import InputError, shown
from .traces.gpus import GPUS, find_gpu
from .traces.json_files import read_json
from .traces.model_config import read_config


def analytic(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A Hugging Face model's config.json.")
    ],
    gpu: Annotated[
        str,
        typer.Option("--gpu", help=f"One of {', '.join(GPUS)}.", rich_help_panel=opt.WORK),
    ],
    sequence: Annotated[
        int, typer.Option("--sequence", help="Tokens a sequence.", rich_help_panel=opt.WORK)
    ],
    batch: Annotated[
        int, typer.Option("--batch", help="Sequences a microbatch.", rich_help_panel=opt.WORK)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Write the trace here.", rich_help_panel=opt.OUTPUT),
    ],
    lora_rank: Annotated[
        int,
        typer.Option(
            "--lora-rank",
            help="Train only adapters of this rank on attention's linear layers.",
            rich_help_panel=opt.WORK,
        ),
    ] = 0,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The model's name in the trace.", rich_help_panel=opt.WORK),
    ] = None,
    matmul: Annotated[
        float | None,
        typer.Option(
            "--matmul-efficiency",
            help="The share of the peak that matrix products reach, instead of the GPU's.",
            rich_help_panel=opt.WORK,
        ),
    ] = None,
) -> None:
    """Compute a trace from a model's config.json and a GPU's specification; no GPU is needed."""
    chosen = find_gpu(gpu)
    data = read_json(config, "config")
    if not isinstance(data, dict):
        raise InputError(f"{shown(config)}: must be a JSON object")
    try:
        params = read_config(data).params
    except InputError as error:
        raise InputError(f"{shown(config)}: {error}") from None
    trace = analytic_trace(
        data,
        chosen,
        sequence=sequence,
        batch=batch,
        lora_rank=lora_rank,
        name=name or "",
        efficiency=replace(Efficiency(), matmul=matmul),
    )
    trace.save(output)
    rows = (
        ("parameters", f"{params / 1e9:.3g} billion"),
        ("layers", str(len(trace.layers))),
        ("block forward", human_seconds(trace.layers[-2].forward_ns / 1e9)),
        ("block backward", human_seconds(trace.layers[-2].backward_ns / 1e9)),
        ("head forward", human_seconds(trace.layers[-1].forward_ns / 1e9)),
        ("head backward", human_seconds(trace.layers[-1].backward_ns / 1e9)),
        ("weights", human_bytes(sum(layer.param_bytes for layer in trace.layers))),
        ("written to", shown(output)),
        ("", trace.provenance),
    )
    for key, value in rows:
        say(Console(), f"{key:14}  {value}")
