"""`roundel profile`."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import options as opt
from . import train_options as own
from .analysis.units import human_bytes, human_rate, human_seconds
from .console import Tell, busy, say
from .policies.plan import Place
from .policies.work import Work
from .traces.errors import InputError, shown
from .traces.machine import Machine
from .traces.trace import LayerCost, Trace
from .train_settings import TrainConfig, read_settings

if TYPE_CHECKING:
    from .train_job import Job

Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="Write the trace here.", rich_help_panel=opt.OUTPUT),
]
MachineOutput = Annotated[
    Path | None,
    typer.Option("--machine-output", help="Write the machine here.", rich_help_panel=opt.OUTPUT),
]


def profile(
    output: Output,
    what: own.What = None,
    model: own.Model = None,
    tied: own.Tied = None,
    ffn_chunk: own.FfnChunk = None,
    dtype: own.Dtype = None,
    compute_dtype: own.ComputeDtype = None,
    autocast: own.Autocast = None,
    data: own.Data = None,
    tokenizer: own.Tokenizer = None,
    sequence: own.Sequence = None,
    devices: own.DeviceNames = None,
    microbatches: own.Microbatches = None,
    batch: own.Batch = None,
    optim: own.Optim = None,
    memory: own.Memory = None,
    host_memory: own.HostMemory = None,
    machine_output: MachineOutput = None,
) -> None:
    """Measure a model's layers and this machine, for the simulator: a trace and a machine file.

    One layer of each kind is run at a time, so that the model may be larger than the GPU.
    A microbatch is --batch / --microbatches samples.
    """
    given = dict.fromkeys(own.FLAGS) | locals()
    path, flags = own.flags_of(given)
    if machine_output and machine_output.resolve() == output.resolve():
        raise InputError(f"--machine-output: {shown(output)} is where the trace goes; name another")
    console = Console()
    work = profiled(read_settings(path, flags), console)
    work.trace.save(output)
    if machine_output:
        work.machine.save(machine_output)
    print_profile(console, work)
    say(console, _next(output, machine_output, work))


def profiled(config: TrainConfig, console: Console) -> Work:
    """What the layers and the machine of these settings cost. Raises InputError."""
    from .executor.places import sharing_cores

    with busy("loading", console):
        from .train_job import Job

        job = Job.of(config, empty=True)
    with sharing_cores(job.devices), busy("measuring", console) as tell:
        return measured(job, tell)


def measured(job: "Job", tell: Tell, updates_on: Collection[Place] = ()) -> Work:
    """The work of a job, measured; a model that cannot be run is an InputError."""
    from .executor.training_setup import explain

    try:
        return job.measured(
            lambda layer, count, name: tell(f"measuring layer {layer + 1} of {count}: {name}"),
            updates_on=updates_on,
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model: {explain(error)}") from error


def print_profile(console: Console, work: Work) -> None:
    """The layers by kind, and what hangs on what."""
    table = Table(box=SIMPLE_HEAD, title=work.trace.name, title_justify="left")
    for name, justify in (
        ("layers", "left"),
        *((each, "right") for each in ("forward", "backward", "weights", "saved", "workspace")),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for cost, count in _kinds(work.trace).items():
        kind = cost.name if count == 1 else f"{count} x {cost.name}"
        times = (cost.forward_ns, cost.backward_ns)
        sizes = (cost.param_bytes, cost.saved_bytes, cost.workspace_bytes)
        table.add_row(
            kind, *(human_seconds(each / 1e9) for each in times), *map(human_bytes, sizes)
        )
    console.print(table)
    _print_machine(console, work.machine)


def _kinds(trace: Trace) -> Counter[LayerCost]:
    """How many layers cost the same, by that cost without the layer's number."""
    return Counter(
        layer.model_copy(update={"name": layer.name.partition(".")[2]}) for layer in trace.layers
    )


def _print_machine(console: Console, machine: Machine) -> None:
    for link in machine.links:
        say(console, f"{link.a} - {link.b}: {human_bytes(link.bytes_per_s)}/s")
    rate = human_rate(machine.host.optimizer_params_per_s)
    say(console, f"optimizer on the host: {rate} parameters/s")
    say(console, f"launching a task: {human_seconds(machine.host.task_ns / 1e9)}")


def _next(output: Path, machine_output: Path | None, work: Work) -> str:
    machine = f" --machine {shown(machine_output)}" if machine_output else ""
    size = f"-d {work.devices} -m {work.microbatches}"
    return f"wrote {shown(output)}; next: roundel compare {shown(output)} {size}{machine}"
