"""The command line: `roundel simulate | compare | plan | traces | train | import` and others."""

import io
import json
import logging
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from . import __version__, report
from . import options as opt
from .analytic_command import analytic
from .api import Comparison, Simulation, compare_work, simulate_work
from .console import busy
from .import_command import import_trace
from .policies.catalog import POLICIES, split_names
from .policies.planning import plan_of
from .profile_command import profile
from .published_command import published
from .traces.errors import InputError
from .train_command import train
from .validate_command import validate_command

app = typer.Typer(
    name="roundel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
progress = Console(stderr=True)

EXTRAS = {"torch": "torch", "safetensors": "torch", "transformers": "hf"}
"""Which extra of the package brings what can be missing."""

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn whoever trains of what is no concern of theirs, when they are imported."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for words that it does not understand."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. A wrong input is one line on standard error, and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a sign shows another one instead.
        sys.stdout.reconfigure(errors="replace")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Before torch is imported. Under a cap, gaps between fixed segments are memory lost.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _refuse_empty(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(error.format_message().replace(": Value error, ", ": ", 1))  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        _fail(
            f"this needs {error.name}, which is not installed: run `make setup` where Roundel's "
            f"Makefile is, or pip install '.[{extra}]' there"
        )
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        # Whoever reads may be gone, or the device full: nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"roundel: cannot write the output: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)


def _refuse_empty(arguments: list[str]) -> None:
    """No argument has a meaning when it is empty: a shell's variable was, most likely."""
    for before, each in pairwise(["roundel", *arguments]):
        if not each:
            raise InputError(f"an empty argument behind {before}: fill it, or leave it out")
        if each.startswith("--") and each.endswith("=") and each.count("=") == 1:
            raise InputError(f"{each[:-1]}: must not be empty")


def _fail(message: str) -> NoReturn:
    one_line = " ".join(message.split())
    if one_line:
        print(f"roundel: {one_line}", file=sys.stderr)
    sys.exit(2)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"roundel {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Simulate every pipeline schedule on your hardware, pick the best, and train with it."""


@app.command(
    epilog="Example: roundel simulate qwen3-1.7b-rtx4090 --policy round-robin "
    "--devices 8 --microbatches 16 --plot steps.png"
)
def simulate(
    trace: opt.Trace,
    policy: opt.PolicyName,
    microbatches: opt.Microbatches,
    devices: opt.Devices = None,
    machine: opt.MachineOption = None,
    memory: opt.Memory = None,
    host_memory: opt.HostMemory = None,
    steps: opt.Steps = None,
    hop_ms: opt.HopMs = None,
    partition: opt.Partition = None,
    recompute: opt.RecomputeOption = None,
    recompute_layers: opt.RecomputeLayers = None,
    chunks: opt.Chunks = None,
    round_size: opt.RoundSize = None,
    optimizer: opt.OptimizerOption = None,
    optimizer_on: opt.OptimizerOn = None,
    activations: opt.Activations = None,
    clip: opt.Clip = None,
    weight_share: opt.WeightShare = None,
    own: opt.Set = None,
    plot: opt.Plot = None,
    memory_plot: Annotated[
        Path | None,
        typer.Option("--memory-plot", help="Draw memory over time.", rich_help_panel=opt.OUTPUT),
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            "--perfetto",
            help="Write a Chrome trace for ui.perfetto.dev (.json or .json.gz).",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Write the tasks as CSV.", rich_help_panel=opt.OUTPUT),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Simulate one policy: step time, bubbles, transfers, memory; its picture with --plot."""
    knobs, work = opt.knobs_of(locals()), opt.work_of(locals())
    chosen = opt.policies_of([policy], knobs)[0]
    with busy(f"simulating {policy}", progress):
        simulation = simulate_work(work, chosen, steps)
        report.write_outputs(simulation, plot, memory_plot, perfetto, csv)
    if as_json:
        print(json.dumps(_json(simulation)))
    else:
        report.print_simulation(Console(), simulation)


@app.command(
    epilog="Example: roundel compare llama-3.1-8b-rtx4090 --policies gpipe,1f1b,round-robin "
    "--devices 8 --microbatches 16 --plot pictures"
)
def compare(
    trace: opt.Trace,
    microbatches: opt.Microbatches,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="Names, or file.py:Class, with commas between, each with knobs of its own where "
            "they stand behind it: round-robin\\[optimizer=stale]; or all.",
            rich_help_panel=opt.WORK,
        ),
    ] = "all",
    devices: opt.Devices = None,
    machine: opt.MachineOption = None,
    memory: opt.Memory = None,
    host_memory: opt.HostMemory = None,
    steps: opt.Steps = None,
    hop_ms: opt.HopMs = None,
    partition: opt.Partition = None,
    recompute: opt.RecomputeOption = None,
    recompute_layers: opt.RecomputeLayers = None,
    chunks: opt.Chunks = None,
    round_size: opt.RoundSize = None,
    optimizer: opt.OptimizerOption = None,
    optimizer_on: opt.OptimizerOn = None,
    activations: opt.Activations = None,
    clip: opt.Clip = None,
    weight_share: opt.WeightShare = None,
    own: opt.Set = None,
    fair: Annotated[
        bool,
        typer.Option(
            "--fair",
            help="Also run every policy with the same early recompute, and say what is left of "
            "round-robin's advantage.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Write the pictures into this folder.", rich_help_panel=opt.OUTPUT
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Simulate several policies on the same work: the table, the pictures and the winner."""
    knobs, work = opt.knobs_of(locals()), opt.work_of(locals())
    names = list(POLICIES) if policies == "all" else split_names(policies)
    with busy("simulating", progress) as tell:
        comparison = compare_work(work, opt.policies_of(names, knobs), steps, tell)
        written = report.write_pictures(comparison, plot, tell) if plot else []
        rows = None
        if fair:
            compared = report.fair_comparison(work, names, knobs, steps, tell)
            rows = report.fair_rows(compared)
    if as_json:
        print(json.dumps(_comparison_json(comparison, rows)))
    else:
        report.print_comparison(Console(), comparison, written)
        if rows is not None:
            report.print_fair(Console(), rows)
    if not comparison.simulations:
        raise InputError("policies: none of them could run; each says why")


@app.command(
    epilog="Example: roundel plan qwen3-1.7b-rtx4090 --policy 1f1b --devices 4 --microbatches 8"
)
def plan(
    trace: opt.Trace,
    policy: opt.PolicyName,
    microbatches: opt.Microbatches,
    devices: opt.Devices = None,
    machine: opt.MachineOption = None,
    memory: opt.Memory = None,
    host_memory: opt.HostMemory = None,
    step: Annotated[
        int, typer.Option("--step", min=0, help="Step number.", rich_help_panel=opt.WORK)
    ] = 0,
    hop_ms: opt.HopMs = None,
    partition: opt.Partition = None,
    recompute: opt.RecomputeOption = None,
    recompute_layers: opt.RecomputeLayers = None,
    chunks: opt.Chunks = None,
    round_size: opt.RoundSize = None,
    optimizer: opt.OptimizerOption = None,
    optimizer_on: opt.OptimizerOn = None,
    activations: opt.Activations = None,
    clip: opt.Clip = None,
    weight_share: opt.WeightShare = None,
    own: opt.Set = None,
    csv: Annotated[
        bool,
        typer.Option("--csv", help="Print CSV, a device a row.", rich_help_panel=opt.OUTPUT),
    ] = False,
) -> None:
    """Print a policy's plan: a column per device, the ops in order."""
    knobs, work = opt.knobs_of(locals()), opt.work_of(locals())
    made = plan_of(opt.policies_of([policy], knobs)[0], work, step)
    made.check(work)
    print(made.to_csv() if csv else made.grid(), end="")


@app.command(epilog="Example: roundel traces")
def traces() -> None:
    """List the traces and machines of the library."""
    report.print_library(Console())


@app.command(epilog="Example: roundel policies")
def policies() -> None:
    """List the policies and their knobs."""
    report.print_policies(Console())


app.command(epilog="Example: roundel train examples/train.toml --policy auto")(train)
app.command("import", epilog="Example: roundel import profile.json --tokens 8192 -o trace.json")(
    import_trace
)
app.command(
    epilog="Example: roundel analytic config.json --gpu rtx-4090 --sequence 2048 --batch 4 "
    "-o trace.json"
)(analytic)
app.command(epilog="Example: roundel published --plot published.png")(published)
app.command(epilog="Example: roundel profile decoder-10m --batch 4 -m 1 -o trace.json")(profile)
app.command(
    "validate", epilog="Example: roundel validate decoder-10m --policies gpipe,round-robin -o out"
)(validate_command)


def _json(simulation: Simulation) -> dict[str, Any]:
    return simulation.metrics.to_json(simulation.name)


def _comparison_json(comparison: Comparison, fair: list[dict[str, Any]] | None) -> dict[str, Any]:
    extra = {} if fair is None else {"fair": fair}
    return {
        "winner": comparison.best.name if comparison.best else None,
        "policies": [_json(simulation) for simulation in comparison.simulations],
        "refused": comparison.refused,
        **extra,
    }
