"""`roundel validate`."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import options as opt
from . import train_options as own
from .analysis.chrome import write_chrome_trace
from .analysis.files import file_stems, make_folder
from .analysis.metrics import measure
from .analysis.timeline_picture import draw_pair
from .analysis.units import human_bytes, human_seconds, human_share
from .console import Tell, busy, say
from .policies.catalog import POLICIES, split_names
from .policies.policy import Policy, places_of_updates
from .policies.work import Work
from .profile_command import measured, print_profile
from .traces.errors import InputError, shown
from .train_settings import read_settings
from .validate import Validation, differences, error, validate

if TYPE_CHECKING:
    from .train_job import Job

LATE = 0.1
"""What share of its ops a GPU may wait for the host in without a word."""

DEFAULT = "gpipe,1f1b,interleaved-1f1b,round-robin,layer-to-layer"


def validate_command(
    what: own.What = None,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="Names or file.py:Class, with commas between, each with knobs of its own where "
            "they stand behind it: round-robin\\[optimizer=stale].",
            rich_help_panel=opt.POLICY,
        ),
    ] = DEFAULT,
    count: Annotated[
        int, typer.Option("--measure", min=1, help="Steps to measure, after two to warm up.")
    ] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder for the trace, the machine, all figures, and of each policy a picture "
            "and both timelines as Chrome traces.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    model: own.Model = None,
    tied: own.Tied = None,
    ffn_chunk: own.FfnChunk = None,
    dtype: own.Dtype = None,
    compute_dtype: own.ComputeDtype = None,
    autocast: own.Autocast = None,
    data: own.Data = None,
    tokenizer: own.Tokenizer = None,
    sequence: own.Sequence = None,
    partition: opt.Partition = None,
    recompute: opt.RecomputeOption = None,
    recompute_layers: opt.RecomputeLayers = None,
    chunks: opt.Chunks = None,
    round_size: opt.RoundSize = None,
    optimizer: opt.OptimizerOption = None,
    optimizer_on: opt.OptimizerOn = None,
    activations: opt.Activations = None,
    weight_share: opt.WeightShare = None,
    own_knobs: opt.Set = None,
    devices: own.DeviceNames = None,
    microbatches: own.Microbatches = None,
    batch: own.Batch = None,
    optim: own.Optim = None,
    lr: own.Lr = None,
    memory: own.Memory = None,
    host_memory: own.HostMemory = None,
    seed: own.Seed = None,
) -> None:
    """Predict policies' steps from a profile made now, run them, and say how far off it was."""
    given = dict.fromkeys(own.FLAGS) | locals()
    path, flags = own.flags_of(given)
    config = read_settings(path, flags)
    console = Console()
    if output:
        make_folder(output)
    from .executor.places import sharing_cores
    from .train_job import ON_CPU, Job, named_policies

    chosen = named_policies(config, _names(policies))
    with busy("loading", console):
        job = Job.of(config)
    with sharing_cores(job.devices), busy("measuring", console) as tell:
        work = measured(job, tell, places_of_updates(chosen.values()))
        print_profile(console, work)
        if any(device.type == "cpu" for device in job.devices):
            say(console, ON_CPU)
        validations: list[Validation] = []
        if output:
            work.trace.save(output / "trace.json")
            work.machine.save(output / "machine.json")
        for done in _validated(job, work, chosen, count, console, tell, output):
            validations.append(done)
            if output:
                # What has been found is not lost if a later policy takes all with it.
                write_figures(output, validations)
    if not validations:
        raise InputError("policies: none of them could run; the lines above say why")
    print_validations(console, validations)
    if output:
        what = "trace, machine, validate.json, pictures and Chrome traces"
        say(console, f"wrote {shown(output)}: {what}")


def _names(text: str) -> list[str]:
    names = split_names(text)
    if names == ["all"]:
        return list(POLICIES)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--policies: {twice[0]} is named twice")
    if not names:
        raise InputError("--policies: name at least one")
    return names


def _validated(
    job: "Job",
    work: Work,
    chosen: dict[str, Policy],
    count: int,
    console: Console,
    tell: Tell,
    output: Path | None,
) -> Iterator[Validation]:
    """Each policy that runs; of one that does not, why not. Draws and writes each as it comes."""
    from .executor.training_setup import explain

    stems = file_stems(chosen)
    for name, policy in chosen.items():
        tell(f"running {name}")
        try:
            done = validate(job, work, name, policy, count)
        except InputError as refused:
            say(console, f"{name}: {refused}")
            continue
        except Exception as error:
            say(console, f"{name}: {explain(error)}")
            continue
        if output:
            measured = replace(done.run.timeline, name=name)
            file = stems[name]
            draw_pair(done.alone, measured, output / f"{file}.png")
            write_chrome_trace(done.alone, output / f"{file}.predicted.json.gz")
            write_chrome_trace(measured, output / f"{file}.measured.json.gz")
        yield done


def print_validations(console: Console, validations: list[Validation]) -> None:
    """Predicted beside measured, the largest differences, and whether the order was right."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("policy", overflow="fold", min_width=12)
    table.add_column("", no_wrap=True)
    for name in ("step", "bubble", "exposed", "peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in validations:
        for row in _rows(each):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for each in validations:
        for found in differences(each.alone, each.run.timeline, 2):
            say(
                console,
                f"{each.name}: {found.lane}, {found.kind}: "
                f"{human_seconds(found.predicted_s)} predicted, "
                f"{human_seconds(found.measured_s)} measured; ends at "
                f"{human_seconds(found.predicted_end_s)} / {human_seconds(found.measured_end_s)}",
            )
        if each.run.retries:
            say(
                console,
                f"{each.name}: torch's allocator gave all its memory back {each.run.retries} times "
                "while these steps ran, which stops a GPU; a finer cut leaves it more room",
            )
        for lane, (late, ops) in each.run.late.items():
            if each.run.memory_bytes is not None and late > LATE * ops:
                say(console, f"{each.name}: {lane} waited for the host in {late} of {ops} ops")
        left = error(each.resimulated.metrics.step_s, each.step_s)
        say(console, f"{each.name}: simulated again as its own ops and updates took: {left:+.1%}")
    wrong = wrong_order(validations)
    say(console, f"order of the policies: {wrong or 'as predicted'}")


def wrong_order(validations: list[Validation]) -> str:
    """The pairs of policies of which the other one was faster than predicted."""
    pairs = [
        f"{a.name} / {b.name}"
        for a, b in combinations(validations, 2)
        if (a.predicted.metrics.step_s - b.predicted.metrics.step_s) * (a.step_s - b.step_s) < 0
    ]
    return f"other than predicted for {', '.join(pairs)}" if pairs else ""


def _rows(each: Validation) -> list[list[str]]:
    step_s = each.predicted.metrics.step_s
    alone, real = measure(each.alone), measure(each.run.timeline)
    expected, memory = each.expected_bytes, each.run.memory_bytes
    return [
        [
            escape(each.name),
            "predicted",
            human_seconds(step_s),
            human_share(alone.bubble_ratio),
            human_seconds(alone.exposed_transfer_s),
            human_bytes(expected),
        ],
        [
            "",
            "measured",
            human_seconds(each.step_s),
            human_share(real.bubble_ratio),
            human_seconds(real.exposed_transfer_s),
            "not counted" if memory is None else human_bytes(memory),
        ],
        [
            "",
            "error",
            f"{error(step_s, each.step_s):+.1%}",
            f"{100 * (alone.bubble_ratio - real.bubble_ratio):+.1f} pt",
            "",
            "" if memory is None else f"{error(expected, memory):+.1%}",
        ],
    ]


def write_figures(folder: Path, validations: list[Validation]) -> None:
    """All figures so far, in place of those before; whoever is killed leaves these or those."""
    figures: dict[str, Any] = {"policies": [each.to_json() for each in validations]}
    made = folder / "validate.json.tmp"
    made.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    made.replace(folder / "validate.json")
