"""What the command line prints and writes: figures, pictures, and what does not fit."""

from dataclasses import fields, replace
from inspect import getdoc
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .analysis.bubble_picture import draw_bubbles
from .analysis.chrome import write_chrome_trace
from .analysis.files import file_stems, make_folder
from .analysis.frames import write_csv
from .analysis.memory_picture import draw_memory
from .analysis.table import comparison_table
from .analysis.timeline_picture import draw_timeline
from .analysis.units import counted, human_bytes, human_rate, human_seconds, human_share
from .api import Comparison, Simulation, compare_work, full_name
from .console import Tell, say
from .options import policies_of
from .policies.catalog import POLICIES, known_knobs
from .policies.policy import Policy, policy_name
from .policies.round_robin import RoundRobin
from .policies.work import Work
from .traces.errors import InputError
from .traces.library import load_machine, load_trace, machine_names, trace_names
from .traces.timeline import MemoryCurve

SAME = 5e-4
"""Steps whose times are no further apart are as fast as each other."""


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
    comparison: Comparison, folder: Path, tell: Tell = lambda what: None
) -> list[Path]:
    """A timeline and a memory picture per policy, and one of all bubbles. Returns the files.

    Raises InputError when the folder cannot be made.
    """
    make_folder(folder)
    written = []
    stems = file_stems(each.name for each in comparison.simulations)
    for simulation in comparison.simulations:
        tell(f"drawing {simulation.name}")
        name = stems[simulation.name]
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
        ("policy", full_name(simulation.policy)),
        ("trace", f"{work.trace.name} ({work.trace.device}), {work.layers} layers"),
        ("machine", _machine(work)),
        (
            "work",
            f"{counted(metrics.steps, 'step')} of {counted(metrics.microbatches, 'microbatch')}",
        ),
        ("makespan", human_seconds(metrics.makespan_s)),
        ("step time", human_seconds(metrics.step_s)),
        ("throughput", f"{human_rate(metrics.tokens_per_s)} tokens/s"),
        (
            "bubble ratio",
            f"{human_share(metrics.bubble_ratio)} (fill {human_share(bubble.fill)}, switch "
            f"{human_share(bubble.switch)}, drain {human_share(bubble.drain)}, steady "
            f"{human_share(bubble.steady)}); by span {human_share(metrics.bubble_ratio_span)}",
        ),
        (
            "exposed transfers",
            f"{human_seconds(metrics.exposed_transfer_s / metrics.steps)} a step and device",
        ),
        ("peak memory", ", ".join(map(human_bytes, metrics.peak_memory_bytes))),
        ("peak host memory", human_bytes(metrics.peak_host_memory_bytes)),
        ("fits", "yes" if metrics.fits else "no"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[bold]{name:{width}}[/]  {escape(value)}", highlight=False, soft_wrap=True)
    _print_misfits(console, simulation)
    _note_on_bytes(console, work)


def _note_on_bytes(console: Console, work: Work) -> None:
    if not any(layer.param_bytes or layer.saved_bytes for layer in work.trace.layers):
        say(console, "the trace has no bytes of its layers: what they need of memory is not known")


def print_comparison(
    console: Console,
    comparison: Comparison,
    written: list[Path],
    misfits: bool = True,
    rows: int | None = None,
) -> None:
    """The table, the winner and by how much, who cannot run and why, and where the pictures are.

    `misfits`: say of each policy that does not fit what it is that does not. `rows`: so many of
    the best ones at most are in the table; None: all.
    """
    if comparison.simulations:
        work = comparison.simulations[0].work
        say(
            console,
            f"{work.trace.name} on {_machine(work)}, "
            f"{counted(work.microbatches, 'microbatch')} a step, "
            f"{counted(comparison.simulations[0].metrics.steps, 'step')}",
        )
        metrics = {each.name: each.metrics for each in comparison.ranking[:rows]}
        console.print(comparison_table(metrics, width=console.width))
        if more := len(comparison.ranking) - len(metrics):
            say(console, f"and {more} more, which are slower or do not fit")
    for name, reason in comparison.refused.items():
        say(console, f"{name} cannot run: {reason}")
    say(console, verdict(comparison))
    for simulation in comparison.simulations if misfits else ():
        _print_misfits(console, simulation)
    if comparison.simulations:
        _note_on_bytes(console, comparison.simulations[0].work)
    if written:
        say(console, f"pictures: {written[0].parent}/")


def verdict(comparison: Comparison) -> str:
    """Who wins and by how much, in one sentence."""
    best = comparison.best
    if not comparison.simulations:
        return "no winner: none of these policies can run"
    if best is None:
        return "no winner: none of these policies fits the memory"
    others = [each for each in comparison.simulations if each is not best]
    fitting = [each for each in others if each.metrics.fits]
    misfits = [each for each in others if not each.metrics.fits]
    said = [f"winner: {best.name}, {human_seconds(best.metrics.step_s)} a step"]
    if others and not any(_are_as_fast(best, each) for each in fitting):
        said[0] += f", {_why(best, fitting)}"
    if fitting:
        said.append(_against(best, fitting, "of the others that fit"))
    if misfits:
        said.append(_against(best, misfits, "of those that do not fit"))
    return "; ".join(said)


def _why(best: Simulation, fitting: list[Simulation]) -> str:
    """Why it wins: it alone fits, or where its GPUs stand idle less than the next one's."""
    if not fitting:
        return "the only one that fits"
    second = min(fitting, key=lambda each: each.metrics.step_s)
    idle, more = best.metrics.bubble_ratio, second.metrics.bubble_ratio
    if idle < more:
        its = f"{second.name}'s {human_share(more)}"
        return f"whose GPUs stand idle {human_share(idle)} of the time ({its})"
    return "which computes less again"


def _are_as_fast(best: Simulation, other: Simulation) -> bool:
    mine, theirs = best.metrics.step_s, other.metrics.step_s
    return not mine or not theirs or abs(theirs / mine - 1) < SAME


def _against(best: Simulation, others: list[Simulation], which: str) -> str:
    second = min(others, key=lambda each: each.metrics.step_s)
    mine, theirs = best.metrics.step_s, second.metrics.step_s
    if _are_as_fast(best, second):
        return f"as fast as {second.name}, the fastest {which}"
    if theirs > mine:
        return f"{human_share(theirs / mine - 1)} faster than {second.name}, the fastest {which}"
    return f"{human_share(mine / theirs - 1)} slower than {second.name}, the fastest {which}"


def fair_comparison(
    work: Work, names: list[str], knobs: dict[str, Any], steps: int | None, tell: Tell
) -> list[tuple[str, Comparison]]:
    """The same policies with late and with early recompute, each as (what it is, comparison).

    First as published: only round-robin recomputes early. Then all do that can.
    """
    early = policies_of(names, {**knobs, "recompute": "early"})
    late = [_late(policy) for policy in early]
    return [
        ("for round-robin only", compare_work(work, late, steps, tell)),
        ("for all", compare_work(work, early, steps, tell)),
    ]


def _is_round_robin(policy: Policy) -> bool:
    return policy_name(policy) == RoundRobin.name


def _late(policy: Any) -> Any:
    if _is_round_robin(policy) or "recompute" not in known_knobs(type(policy)):
        return policy
    return replace(policy, recompute="late")


def fair_rows(compared: list[tuple[str, Comparison]]) -> list[dict[str, Any]]:
    """The fastest round-robin's step, the fastest other's and the advantage, one a comparison.

    Raises InputError where round-robin or every other is missing or cannot run.
    """
    rows = []
    for what, comparison in compared:
        mine, others = (
            [each for each in comparison.simulations if _is_round_robin(each.policy) is wanted]
            for wanted in (True, False)
        )
        if not mine or not others:
            reasons = "; ".join(f"{name}: {why}" for name, why in comparison.refused.items())
            raise InputError(
                f"--fair: needs round-robin and another policy that can run. {reasons}".strip()
            )
        first, second = (min(each, key=lambda one: one.metrics.step_s) for each in (mine, others))
        ours, theirs = first.metrics.step_s, second.metrics.step_s
        rows.append(
            {
                "early_recompute": what,
                "round_robin_step_s": ours,
                "fastest_other": second.name,
                "fastest_other_step_s": theirs,
                "advantage": theirs / ours - 1 if ours else 0.0,
            }
        )
    return rows


def print_fair(console: Console, rows: list[dict[str, Any]]) -> None:
    """For each of the comparisons, round-robin against the fastest of the others."""
    console.print("\n[bold]round-robin against the others, recompute alike, memory left aside[/]")
    say(console, "All of these recompute, late or early; the table above is of what was asked for.")
    table = _table("early recompute", "round-robin", "fastest other", "its step", "advantage")
    for row in rows:
        table.add_row(
            row["early_recompute"],
            human_seconds(row["round_robin_step_s"]),
            escape(row["fastest_other"]),
            human_seconds(row["fastest_other_step_s"]),
            f"{100 * row['advantage']:+.1f} %",
        )
    console.print(table)
    first, last = (f"{100 * row['advantage']:+.1f} %" for row in rows)
    say(console, f"of {first}, {last} is left")


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


def print_policies(console: Console) -> None:
    """The policies by name: what each does, and its knobs with their defaults."""
    table = Table(box=SIMPLE_HEAD)
    for header in ("policy", "what it does", "knobs"):
        table.add_column(header, no_wrap=header == "policy", overflow="fold")
    for name, policy in POLICIES.items():
        knobs = (each for each in fields(policy) if each.init)
        shown = ", ".join(f"{each.name}={each.default}" for each in knobs)
        table.add_row(name, _first_line(policy), shown, end_section=True)
    console.print(table)
    say(console, "knobs stand behind a name, 1f1b[recompute=early], or are options of their own")


def _first_line(policy: type) -> str:
    return (getdoc(policy) or "").splitlines()[0].rstrip(".")


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
    others = len(over) - 1
    more = f"; so {'are' if others > 1 else 'is'} {counted(others, 'other')}" if others else ""
    say(console, f"{simulation.name} does not fit: {_misfit(worst)}{more}")


def _misfit(curve: MemoryCurve) -> str:
    holders = ", ".join(f"{what} {human_bytes(size)}" for what, size in curve.holders)
    over, limit = human_bytes(curve.over_bytes), human_bytes(curve.limit_bytes)
    return (
        f"{curve.name} is {over} over its {limit} "
        f"at {human_seconds(curve.peak_ns / 1e9)}: {holders}"
    )


def _machine(work: Work) -> str:
    machine = work.machine
    said = f"{counted(work.devices, 'device')} of {machine.name}"
    limits = [device.memory_bytes for device in machine.devices]
    notes = [_limits(limits)]
    if machine.name == "ideal":
        notes.append("updates and transfers to the host take no time")
    said += f" ({', '.join(notes)})"
    if machine.hop_ns:
        said += f", {human_seconds(machine.hop_ns / 1e9)} from one device to another"
    return said


def _limits(limits: list[int]) -> str:
    """What the devices have of memory; 0 is no limit."""
    if not any(limits):
        return "no memory limits"
    if not all(limits):
        return f"{limits.count(0)} without a memory limit"
    least, most = human_bytes(min(limits)), human_bytes(max(limits))
    return f"{least} each" if least == most else f"{least} to {most}"


def _title(simulation: Simulation) -> str:
    policy = simulation.policy
    plain = simulation.name == policy_name(policy)
    return f"{full_name(policy) if plain else simulation.name}: {simulation.work.trace.name}"
