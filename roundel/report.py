"""What the command line prints and writes: figures, pictures, and what does not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .analysis.bubble_picture import draw_bubbles
from .analysis.chrome import write_chrome_trace
from .analysis.frames import write_csv
from .analysis.memory_picture import draw_memory
from .analysis.table import comparison_table
from .analysis.timeline_picture import draw_timeline
from .analysis.units import human_bytes, human_rate, human_seconds, human_share
from .api import Comparison, Simulation, compare_work
from .options import policies_of
from .policies.work import Work
from .traces.errors import InputError
from .traces.library import load_machine, load_trace, machine_names, trace_names
from .traces.timeline import MemoryCurve

Say = Callable[[str], None]


def write_outputs(
    simulation: Simulation,
    plot: Path | None,
    memory_plot: Path | None,
    perfetto: Path | None,
    csv: Path | None,
) -> None:
    """Write the files that were asked for. Raises InputError for a path that cannot be written."""
    timeline = simulation.timeline
    if plot:
        draw_timeline(timeline, plot, _title(simulation))
    if memory_plot:
        draw_memory(timeline, memory_plot, _title(simulation))
    if perfetto:
        write_chrome_trace(timeline, perfetto)
    if csv:
        write_csv(timeline, csv)


def write_pictures(
    comparison: Comparison, folder: Path, say: Say = lambda what: None
) -> list[Path]:
    """A timeline and a memory picture per policy, and one of all bubbles. Returns the files.

    Raises InputError when the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder: {error.strerror}") from None
    written = []
    for simulation in comparison.simulations:
        say(f"drawing {simulation.name}")
        name = _file_name(simulation.name)
        written += [folder / f"{name}.png", folder / f"{name}-memory.png"]
        draw_timeline(simulation.timeline, written[-2], _title(simulation))
        draw_memory(simulation.timeline, written[-1], _title(simulation))
    if comparison.simulations:
        written.append(folder / "bubbles.png")
        work = comparison.simulations[0].work
        title = f"Idle time of the GPUs by policy: {work.trace.name}"
        metrics = {each.name: each.metrics for each in comparison.ranking}
        draw_bubbles(metrics, written[-1], title)
    return written


def print_simulation(console: Console, simulation: Simulation) -> None:
    """The figures of one simulation, and what does not fit."""
    metrics, work = simulation.metrics, simulation.work
    bubble = metrics.bubble
    rows = [
        ("policy", simulation.name),
        ("trace", f"{work.trace.name} ({work.trace.device}), {work.layers} layers"),
        ("machine", _machine(work)),
        ("work", f"{metrics.steps} step(s) of {metrics.microbatches} microbatches"),
        ("makespan", human_seconds(metrics.makespan_s)),
        ("step time", human_seconds(metrics.step_s)),
        ("throughput", f"{human_rate(metrics.tokens_per_s)} tokens/s"),
        (
            "bubble ratio",
            f"{human_share(metrics.bubble_ratio)} (fill {human_share(bubble.fill)}, switch "
            f"{human_share(bubble.switch)}, drain {human_share(bubble.drain)}, steady "
            f"{human_share(bubble.steady)}); by span {human_share(metrics.bubble_ratio_span)}",
        ),
        ("exposed transfers", f"{human_seconds(metrics.exposed_transfer_s)} a device"),
        ("peak memory", ", ".join(map(human_bytes, metrics.peak_memory_bytes))),
        ("peak host memory", human_bytes(metrics.peak_host_memory_bytes)),
        ("fits", "yes" if metrics.fits else "no"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[bold]{name:{width}}[/]  {value}", highlight=False, soft_wrap=True)
    _print_misfits(console, simulation)


def print_comparison(console: Console, comparison: Comparison, written: list[Path]) -> None:
    """The table, the winner and by how much, who cannot run and why, and where the pictures are."""
    if comparison.simulations:
        work = comparison.simulations[0].work
        console.print(
            f"{work.trace.name} on {_machine(work)}, {work.microbatches} microbatches a step",
            highlight=False,
            soft_wrap=True,
        )
        metrics = {each.name: each.metrics for each in comparison.ranking}
        console.print(comparison_table(metrics, width=console.width))
    for name, reason in comparison.refused.items():
        console.print(f"{name} cannot run: {reason}", highlight=False, soft_wrap=True, markup=False)
    console.print(verdict(comparison), highlight=False, soft_wrap=True)
    for simulation in comparison.simulations:
        _print_misfits(console, simulation)
    if written:
        console.print(f"pictures: {written[0].parent}/", highlight=False, soft_wrap=True)


def verdict(comparison: Comparison) -> str:
    """Who wins and by how much, in one sentence."""
    best = comparison.best
    if best is None:
        return "no winner: none of these policies fits the memory"
    others = [each for each in comparison.simulations if each is not best]
    fitting = [each for each in others if each.metrics.fits]
    misfits = [each for each in others if not each.metrics.fits]
    said = [f"winner: {best.name}, {human_seconds(best.metrics.step_s)} a step"]
    if fitting:
        said.append(_against(best, fitting, "of the others that fit"))
    if misfits:
        said.append(_against(best, misfits, "of those that do not fit"))
    return "; ".join(said)


def _against(best: Simulation, others: list[Simulation], which: str) -> str:
    second = min(others, key=lambda each: each.metrics.step_s)
    lead = second.metrics.step_s / best.metrics.step_s - 1
    faster = f"{human_share(abs(lead))} {'faster' if lead >= 0 else 'slower'}"
    return f"{faster} than {second.name}, the fastest {which}"


def fair_comparison(
    work: Work, names: list[str], knobs: dict[str, Any], steps: int, say: Say
) -> list[tuple[str, Comparison]]:
    """The same policies with late and with early recompute, each as (what it is, comparison).

    First as published: only round-robin recomputes early. Then all of them do.
    """
    early = policies_of(names, {**knobs, "recompute": "early"})
    late = [_late(policy) for policy in early]
    return [
        ("for round-robin only", compare_work(work, late, steps, say)),
        ("for all", compare_work(work, early, steps, say)),
    ]


def _late(policy: Any) -> Any:
    streams = getattr(policy, "name", None) == "round-robin"
    return policy if streams else replace(policy, recompute="late")


def print_fair(console: Console, rows: list[tuple[str, Comparison]]) -> None:
    """For each of the comparisons, round-robin against the fastest of the others."""
    console.print("\n[bold]round-robin against the others, memory left aside[/]")
    table = _table("early recompute", "round-robin", "fastest other", "its step", "advantage")
    advantages = []
    for what, comparison in rows:
        mine = [each for each in comparison.simulations if each.name == "round-robin"]
        others = [each for each in comparison.simulations if each.name != "round-robin"]
        if not mine or not others:
            console.print("compare round-robin with at least one other policy to see this")
            return
        second = min(others, key=lambda each: each.metrics.step_s)
        advantage = second.metrics.step_s / mine[0].metrics.step_s - 1
        advantages.append(f"{100 * advantage:+.1f} %")
        table.add_row(
            what,
            human_seconds(mine[0].metrics.step_s),
            second.name,
            human_seconds(second.metrics.step_s),
            advantages[-1],
        )
    console.print(table)
    console.print(f"of {advantages[0]}, {advantages[1]} is left", highlight=False)


def print_library(console: Console) -> None:
    """The library's traces and machines."""
    traces = _table("trace", "GPU", "layers", "tokens", "weights")
    for name in trace_names():
        trace = load_trace(name)
        nbytes = sum(layer.param_bytes for layer in trace.layers)
        cells = (
            trace.device.removeprefix("NVIDIA ").removeprefix("GeForce "),
            str(len(trace.layers)),
            f"{trace.microbatch_tokens:,}",
        )
        traces.add_row(name, *cells, human_bytes(nbytes))
    machines = _table("machine", "devices", "memory each", "host memory")
    for name in machine_names():
        machine = load_machine(name)
        memory = human_bytes(machine.devices[0].memory_bytes)
        machines.add_row(
            name, str(len(machine.devices)), memory, human_bytes(machine.host.memory_bytes)
        )
    console.print(traces)
    console.print(machines)


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, no_wrap=header != "GPU")
    return table


def _print_misfits(console: Console, simulation: Simulation) -> None:
    over = [curve for curve in simulation.timeline.memory if curve.over_bytes]
    if not over:
        return
    worst = max(over, key=lambda curve: curve.over_bytes)
    more = f" (and {len(over) - 1} more)" if len(over) > 1 else ""
    console.print(
        f"{simulation.name} does not fit: {_misfit(worst)}{more}", highlight=False, soft_wrap=True
    )


def _misfit(curve: MemoryCurve) -> str:
    holders = ", ".join(f"{what} {human_bytes(size)}" for what, size in curve.holders)
    over, limit = human_bytes(curve.over_bytes), human_bytes(curve.limit_bytes)
    return (
        f"{curve.name} is {over} over its {limit} "
        f"at {human_seconds(curve.peak_ns / 1e9)}: {holders}"
    )


def _machine(work: Work) -> str:
    machine = work.machine
    if machine.hop_ns is None:
        return f"{work.devices} devices of {machine.name}"
    hop = human_seconds(machine.hop_ns / 1e9)
    return f"{work.devices} devices of {machine.name}, {hop} from one device to another"


def _title(simulation: Simulation) -> str:
    return f"{simulation.name}: {simulation.work.trace.name}"


def _file_name(policy: str) -> str:
    return "".join(each if each.isalnum() or each in "-_." else "_" for each in policy)
