"""A timeline turned back into a trace and a machine: what its ops and updates really took."""

from collections import defaultdict
from statistics import median

from .machine import Machine
from .timeline import Timeline
from .trace import MAX_COUNT, LayerCost, Trace

_FIELDS = {
    "F": "forward_ns",
    "B": "backward_ns",
    "R": "recompute_ns",
    "I": "backward_input_ns",
    "W": "backward_weight_ns",
}


def trace_of_timeline(timeline: Timeline, trace: Trace) -> Trace:
    """The trace with the times of a measured timeline of the same layers; bytes stay.

    An op on several layers tells only their sum, which is shared out as `trace` has it; a layer's
    time is the median over the ops on it. Kinds that did not run keep their times. Simulating the
    result tells what the cost model misses, apart from what the trace missed.
    """
    again = {
        (layer, span.microbatch, span.step)
        for span in timeline.spans()
        if span.kind == "R"
        for layer in range(span.first, span.stop)
    }
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in timeline.spans():
        if span.kind not in _FIELDS:
            continue
        fields = [_FIELDS[span.kind]] * (span.stop - span.first)
        if span.kind == "F" and (span.first, span.microbatch, span.step) in again:
            fields = ["forward_only_ns"] * len(fields)
        if span.kind == "R" and trace.layers[span.stop - 1].recompute_last_ns is not None:
            fields[-1] = "recompute_last_ns"
        costs = trace.layers[span.first : span.stop]
        before = [_time(cost, field) for cost, field in zip(costs, fields, strict=True)]
        for field, layer, time_ns in zip(fields, range(span.first, span.stop), before, strict=True):
            share = time_ns / sum(before) if sum(before) else 1 / len(before)
            found[field, layer].append((span.end_ns - span.start_ns) * share)
    layers = tuple(_updated(cost, number, found) for number, cost in enumerate(trace.layers))
    provenance = f"from a measured timeline of {timeline.name}; before: {trace.provenance}"
    return trace.model_copy(update={"layers": layers, "provenance": provenance})


def machine_of_timeline(timeline: Timeline, predicted: Timeline, machine: Machine) -> Machine:
    """The machine with the rates of the updates that a measured timeline has; links stay.

    predicted: the same step, simulated on `machine`. Where updates took twice as long, the host's
    rates, of adding up too, or a device's are half.
    """
    took, planned = _updates_ns(timeline), _updates_ns(predicted)

    def scaled(rate: int, device: int) -> int:
        if not rate or not took[device] or not planned[device]:
            return rate
        return min(max(1, rate * planned[device] // took[device]), MAX_COUNT)

    host = machine.host
    rates = {
        name: scaled(getattr(host, name), -1)
        for name in ("optimizer_params_per_s", "sum_params_per_s")
    }
    devices = tuple(
        each.model_copy(
            update={"optimizer_params_per_s": scaled(each.optimizer_params_per_s, number)}
        )
        for number, each in enumerate(machine.devices)
    )
    return machine.model_copy(update={"host": host.model_copy(update=rates), "devices": devices})


def _updates_ns(timeline: Timeline) -> dict[int, int]:
    """How long updates took on each device, and on the host (-1)."""
    took: dict[int, int] = defaultdict(int)
    for span in timeline.spans():
        if span.kind == "update":
            took[span.lane.device] += span.end_ns - span.start_ns
    return took


def _time(cost: LayerCost, field: str) -> int:
    time_ns: int | None = getattr(cost, field)
    if time_ns is not None:
        return time_ns
    return cost.backward_ns // 2 if field.startswith("backward") else cost.forward_ns


def _updated(cost: LayerCost, number: int, found: dict[tuple[str, int], list[float]]) -> LayerCost:
    times = {
        field: round(median(found[field, number]))
        for field in (*_FIELDS.values(), "forward_only_ns", "recompute_last_ns")
        if (field, number) in found
    }
    if "recompute_last_ns" in times and "recompute_ns" not in times:
        times["recompute_ns"] = max(_time(cost, "recompute_ns"), times["recompute_last_ns"])
    if "backward_input_ns" in times:
        times["backward_ns"] = times["backward_input_ns"] + times.get("backward_weight_ns", 0)
    elif "backward_ns" in times:
        times |= {"backward_input_ns": None, "backward_weight_ns": None}  # type: ignore[dict-item]
    return cost.model_copy(update=times)
