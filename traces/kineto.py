"""A trace from a profile: what `torch.profiler` exported, divided among the model's layers.

`kineto_file.py` reads the export, `kineto_ranges.py` finds the layers, `kineto_assign.py` says
whose each op and kernel is; here the runs of a layer become one cost. On a GPU a layer's time is
the length of the union of its kernels' times, on the CPU that of its ops. What belongs to no
layer is listed, never shared out.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .errors import InputError, shown
from .kineto_assign import Interval, Occurrence, Phase, Work, assign
from .kineto_file import Event, Export, read_export
from .kineto_ranges import LAYERS, layer_ranges
from .trace import LayerCost, Trace


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of one layer: its times in each of its runs, in nanoseconds."""

    name: str
    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
    recompute_ns: tuple[int, ...]

    @property
    def spread(self) -> float:
        """The longest run minus the shortest over the median, of forward or backward, the worst."""
        return max(_spread(self.forward_ns), _spread(self.backward_ns))


@dataclass(frozen=True)
class Unassigned:
    """Work of no layer: the outermost op's name or the kernel's, its time and part of all work."""

    name: str
    total_ns: int
    share: float


@dataclass(frozen=True)
class Imported:
    """A trace from a profile, and what is not in it.

    `total_ns` is all work in the profile, every kernel's time or every op's own time added up:
    that of the layers (`assigned_ns`), of the optimizer in `optimizer_steps` steps, and of
    `unassigned`, longest first. `without_backward` names layers for which no backward was found,
    because they are frozen or it could not be assigned; in the trace it takes no time.
    """

    trace: Trace
    layers: tuple[LayerTimes, ...]
    unassigned: tuple[Unassigned, ...]
    without_backward: tuple[str, ...]
    total_ns: int
    assigned_ns: int
    optimizer_ns: int
    optimizer_steps: int

    @property
    def unassigned_ns(self) -> int:
        """The work of no layer and not the optimizer's."""
        return sum(each.total_ns for each in self.unassigned)


def import_profile(
    path: str | Path, *, tokens: int, layers: str = LAYERS, name: str | None = None
) -> Imported:
    """The trace in an export of `torch.profiler` (Chrome JSON, also gzipped), of a training step.

    `layers` is a regular expression for the start of the names of the layers' `record_function`
    ranges, or, where no such range matches, of modules (`Block_0`; profiled with
    `with_stack=True`). The same name is the same layer, its runs are merged by median; a group in
    the expression picks the name. Layers come in the order in which they first run. `tokens` is a
    microbatch's. Of the bytes only `output_bytes` is known, with `record_shapes=True`: the size of
    the first input of the next layer. `name` is the trace's, the file's where absent.

    Raises InputError for a file that is no export, and if no layer or no backward is found.
    """
    if tokens < 1:
        raise InputError(f"tokens: a microbatch has at least 1, got {tokens}")
    export = read_export(path)
    occurrences, work = assign(export, layer_ranges(export, layers, shown(path)).get)
    times = _times(occurrences)
    if not any(each.backward_ns for each in times):
        raise InputError(f"{shown(path)}: {_no_backward(export)}")
    trace = Trace(
        name=name or Path(path).name.split(".")[0] or "profile",
        device=export.device,
        provenance=_provenance(export, times, work, Path(path).name),
        microbatch_tokens=tokens,
        layers=tuple(_costs(times, _outputs(times, occurrences))),
    )
    return Imported(
        trace=trace,
        layers=times,
        unassigned=_unassigned(work),
        without_backward=tuple(each.name for each in times if not each.backward_ns),
        total_ns=_total(work),
        assigned_ns=_total(each for each in work if each.context.occurrence),
        optimizer_ns=_total(each for each in work if each.context.phase == "optimizer"),
        optimizer_steps=sum(_is_step(event) for event in export.events),
    )


def _times(occurrences: Iterable[Occurrence]) -> tuple[LayerTimes, ...]:
    runs: dict[str, list[Occurrence]] = {}
    for each in occurrences:
        runs.setdefault(each.layer, []).append(each)
    phases: tuple[Phase, ...] = ("forward", "backward", "recompute")
    return tuple(
        LayerTimes(name, *(_lengths(mine, phase) for phase in phases))
        for name, mine in runs.items()
    )


def _lengths(runs: Iterable[Occurrence], phase: Phase) -> tuple[int, ...]:
    return tuple(_union_ns(run.busy[phase]) for run in runs if run.busy.get(phase))


def _union_ns(intervals: Iterable[Interval]) -> int:
    """The length of the union: what runs at once, on several streams, counts once."""
    total, until = 0, None
    for start, end in sorted(intervals):
        total += max(0, end - start if until is None else end - max(start, until))
        until = end if until is None else max(until, end)
    return total


def _costs(times: Iterable[LayerTimes], outputs: Iterable[int]) -> Iterable[LayerCost]:
    for each, output_bytes in zip(times, outputs, strict=True):
        yield LayerCost(
            name=each.name,
            forward_ns=_median_ns(each.forward_ns) or 0,
            backward_ns=_median_ns(each.backward_ns) or 0,
            recompute_ns=_median_ns(each.recompute_ns),
            output_bytes=output_bytes,
        )


def _outputs(times: tuple[LayerTimes, ...], occurrences: Iterable[Occurrence]) -> list[int]:
    """A layer's output is the next one's input; the last one's is not known."""
    inputs: dict[str, int] = {}
    for each in occurrences:
        inputs[each.layer] = inputs.get(each.layer) or each.input_bytes
    return [*(inputs[each.name] for each in times[1:]), 0]


def _median_ns(lengths: tuple[int, ...]) -> int | None:
    return round(median(lengths)) if lengths else None


def _spread(lengths: tuple[int, ...]) -> float:
    middle = median(lengths) if lengths else 0
    return (max(lengths) - min(lengths)) / middle if middle else 0.0


def _unassigned(work: Iterable[Work]) -> tuple[Unassigned, ...]:
    total, by_name = 0, Counter[str]()
    for each in work:
        total += each.end_ns - each.start_ns
        if each.context.occurrence is None and each.context.phase != "optimizer":
            by_name[each.context.label] += each.end_ns - each.start_ns
    return tuple(Unassigned(name, ns, ns / total) for name, ns in by_name.most_common() if ns)


def _total(work: Iterable[Work]) -> int:
    return sum(each.end_ns - each.start_ns for each in work)


def _is_step(event: Event) -> bool:
    return event.kind == "range" and event.name.startswith("Optimizer.step")


def _no_backward(export: Export) -> str:
    ran = any(event.forward_thread for event in export.events)
    if not ran:
        return "no backward in this export; profile whole steps, loss.backward() included"
    return (
        "no backward could be assigned to a layer; profile whole steps, each forward with its "
        "backward, and see that the layers' ranges are around their forwards"
    )


def _provenance(
    export: Export, times: tuple[LayerTimes, ...], work: tuple[Work, ...], file: str
) -> str:
    worst = max(times, key=lambda each: each.spread)
    runs = [len(each.forward_ns) for each in times]
    most = f"{min(runs)} to {max(runs)} runs" if min(runs) < max(runs) else f"{max(runs)} run(s)"
    total = _total(work) or 1
    mine = _total(each for each in work if each.context.occurrence)
    what = "kernels" if export.kernels else "CPU ops (the export has no kernels)"
    return (
        f"imported from a PyTorch profile, {file}: times of {what}, the median of {most} of each "
        f"layer, which spread by up to {100 * worst.spread:.0f} % ({worst.name}); "
        f"{100 * mine / total:.1f} % of all work is the layers'; bytes of parameters and saved "
        f"tensors are not known"
    )
