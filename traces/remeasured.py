"""A timeline turned back into a trace: what its ops really took, shared out over their layers."""

from collections import defaultdict
from statistics import median

from .timeline import Timeline
from .trace import LayerCost, Trace

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
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in timeline.spans():
        if span.kind not in _FIELDS:
            continue
        costs = trace.layers[span.first : span.stop]
        before = [_time(cost, span.kind) for cost in costs]
        for layer, time_ns in enumerate(before, span.first):
            share = time_ns / sum(before) if sum(before) else 1 / len(before)
            found[span.kind, layer].append((span.end_ns - span.start_ns) * share)
    layers = tuple(_updated(cost, number, found) for number, cost in enumerate(trace.layers))
    provenance = f"from a measured timeline of {timeline.name}; before: {trace.provenance}"
    return trace.model_copy(update={"layers": layers, "provenance": provenance})


def _time(cost: LayerCost, kind: str) -> int:
    time_ns: int | None = getattr(cost, _FIELDS[kind])
    if time_ns is not None:
        return time_ns
    return cost.forward_ns if kind == "R" else cost.backward_ns // 2


def _updated(cost: LayerCost, number: int, found: dict[tuple[str, int], list[float]]) -> LayerCost:
    times = {
        field: round(median(found[kind, number]))
        for kind, field in _FIELDS.items()
        if (kind, number) in found
    }
    if "backward_input_ns" in times:
        times["backward_ns"] = times["backward_input_ns"] + times.get("backward_weight_ns", 0)
    elif "backward_ns" in times:
        times |= {"backward_input_ns": None, "backward_weight_ns": None}  # type: ignore[dict-item]
    return cost.model_copy(update=times)
