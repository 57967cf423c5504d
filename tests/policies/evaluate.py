"""When each op of a plan runs: a few lines that share nothing with the package's own rules."""

from collections.abc import Callable, Iterator

from roundel.policies.op import Op
from roundel.policies.plan import Plan

Span = tuple[int, int]
Done = dict[tuple[str, int, int], tuple[int, int]]
"""(end, device) of `F` (activation of a layer), `G` (gradient that it hands back), `I` and `R`."""


class Deadlock(Exception):
    pass


def evaluate(plan: Plan, op_ns: Callable[[Op], int], hop_ns: int = 0) -> list[list[Span]]:
    """(start, end) of every op, device by device. Raises Deadlock naming the ops that wait."""
    rules = Rules(plan)
    done: Done = {}
    spans: list[list[Span]] = [[] for _ in plan.devices]
    while _advance(plan, op_ns, hop_ns, rules, done, spans):
        pass
    stuck = [
        ops[len(own)] for ops, own in zip(plan.devices, spans, strict=True) if len(own) < len(ops)
    ]
    if stuck:
        raise Deadlock(" ".join(map(str, stuck)))
    return spans


def _advance(
    plan: Plan,
    op_ns: Callable[[Op], int],
    hop_ns: int,
    rules: "Rules",
    done: Done,
    spans: list[list[Span]],
) -> bool:
    moved = False
    for device, ops in enumerate(plan.devices):
        own = spans[device]
        while len(own) < len(ops):
            op = ops[len(own)]
            inputs = list(rules.needs(op))
            if any(value not in done for value in inputs):
                break
            start = own[-1][1] if own else 0
            for value in inputs:
                end, where = done[value]
                start = max(start, end + (hop_ns if where != device else 0))
            own.append((start, start + op_ns(op)))
            done.update((value, (own[-1][1], device)) for value in gives(op))
            moved = True
    return moved


class Rules:
    """What each op of a plan waits for."""

    def __init__(self, plan: Plan) -> None:
        ops = [op for own in plan.devices for op in own]
        self.layers = max(op.stop for op in ops)
        self.recomputed = {(op.first, op.microbatch) for op in ops if op.kind == "R"}
        self.late_recompute = plan.late_recompute

    def needs(self, op: Op) -> Iterator[tuple[str, int, int]]:
        """The values that an op waits for: activations, gradients, what was saved for it."""
        kind, first, stop, microbatch = op
        if kind in "FR" and first > 0:
            yield ("F", first - 1, microbatch)
        if kind in "BIW":
            saved = "R" if (first, microbatch) in self.recomputed else "F"
            yield from (
                ("I" if kind == "W" else saved, layer, microbatch) for layer in range(first, stop)
            )
        if stop < self.layers and (kind in "BI" or (kind == "R" and self.late_recompute)):
            yield ("G", stop, microbatch)


def gives(op: Op) -> Iterator[tuple[str, int, int]]:
    """The values that are there when an op has run."""
    kind, first, stop, microbatch = op
    names = {"F": "F", "B": "G", "I": "GI", "W": "", "R": "R"}[kind]
    return ((name, layer, microbatch) for name in names for layer in range(first, stop))


def makespan(spans: list[list[Span]]) -> int:
    return max(end for own in spans for _, end in own)


def longest_span(spans: list[list[Span]]) -> int:
    """Last end minus first start of the device where that is longest."""
    return max(own[-1][1] - own[0][0] for own in spans)


def busy(spans: list[list[Span]]) -> list[int]:
    return [sum(end - start for start, end in own) for own in spans]


def most_held(ops: tuple[Op, ...]) -> int:
    """The most microbatches of a stage that a device holds between F and the last backward."""
    held = most = 0
    for op in ops:
        held += (op.kind == "F") - (op.kind in "BW")
        most = max(most, held)
    return most
