"""Whose work each op and kernel of a profiler export is: which layer's, and in which phase.

One walk over the host's events in order of time, a stack a thread. The rules:

- *Forward*: what runs in a layer's range; of nested ranges the outermost.
- *Backward*: autograd numbers its functions per thread in the order in which forward makes them,
  and an op in forward carries the number that is next. So of the ops with a function's number the
  last made it, and the function belongs to that op's layer. `AccumulateGrad` has no number: it
  has the highest priority, so that it follows the function that made its gradient.
- *Recompute*: inside backward, a layer's range, or ops that autograd numbers (backward's own ops
  make no functions, unless it is to be differentiated itself, which is not supported).
- A checkpoint's op (`CheckpointFunction`) belongs to the layer whose range alone it encloses.
- *Optimizer*: what runs in the ranges `Optimizer.step#...` and `Optimizer.zero_grad#...`.

A kernel is where its launch is: in the call with its correlation, or else in the op with its
external id. Collectives (`nccl...`) are no layer's work.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .kineto_file import Event, Export, Kind, Thread

Phase = Literal["forward", "backward", "recompute", "optimizer", "other"]
Interval = tuple[int, int]
LayerOf = Callable[[tuple[Kind, str]], str | None]

_FUNCTION = "autograd::engine::evaluate_function: "
_ACCUMULATE = "AccumulateGrad"
_CHECKPOINT = "Checkpoint"
_OPTIMIZER = "Optimizer."


@dataclass(eq=False)
class Occurrence:
    """One run of a layer: when it was busy in each phase, and the size of its first input."""

    layer: str
    busy: dict[Phase, list[Interval]] = field(default_factory=lambda: defaultdict(list))
    input_bytes: int = 0


class Context(NamedTuple):
    """Whose work it is; `label` names the layer, or the outermost op where it is no layer's."""

    occurrence: Occurrence | None
    phase: Phase
    label: str = ""


class Work(NamedTuple):
    """A stretch of time of one op, or one kernel, and whose it is."""

    context: Context
    start_ns: int
    end_ns: int


_NOTHING = Context(None, "other")


@dataclass
class _Frame:
    event: Event
    context: Context
    counted_to_ns: int
    encloses: int = 0


def assign(export: Export, layer_of: LayerOf) -> tuple[tuple[Occurrence, ...], tuple[Work, ...]]:
    """All runs of layers, in order, and all work of the export: kernels, or ops if it has none.

    `layer_of` gives the layer's name for the kind and name of a layer's range, None for others. An
    op's work is the time in which no op or range inside it runs, so that nothing counts twice.
    """
    walk = _Walk(export, layer_of)
    for event in export.events:
        if event.kind != "kernel":
            walk.enter(event)
    walk.leave_all()
    kernels = export.kernels
    work = [walk.kernel(each) for each in kernels] if kernels else walk.work
    for context, start, end in work:
        if context.occurrence:
            context.occurrence.busy[context.phase].append((start, end))
    return tuple(walk.occurrences), tuple(work)


class _Walk:
    def __init__(self, export: Export, layer_of: LayerOf) -> None:
        self.threads, self.layer_of = export.threads, layer_of
        self.occurrences: list[Occurrence] = []
        self.work: list[Work] = []
        self.stacks: dict[Thread, list[_Frame]] = defaultdict(list)
        self.maker: dict[tuple[Thread, int], Occurrence | None] = {}
        self.last_function: dict[Thread, Context] = {}
        self.calls: dict[int | None, Context] = {}
        self.ops: dict[int | None, Context] = {}

    def enter(self, event: Event) -> None:
        stack = self.stacks[event.thread]
        while stack and stack[-1].event.end_ns <= event.start_ns:
            self._leave(stack)
        outer = stack[-1].context if stack else _NOTHING
        if event.kind == "call":
            if event.correlation is not None and outer != _NOTHING:
                self.calls[event.correlation] = outer
            return
        context = self._context(event, outer, stack)
        if stack:
            self._count(stack[-1], event.start_ns)
            if event.end_ns > stack[-1].event.end_ns:
                event = event._replace(end_ns=stack[-1].event.end_ns)
        stack.append(_Frame(event, context, event.start_ns))

    def leave_all(self) -> None:
        for stack in self.stacks.values():
            while stack:
                self._leave(stack)

    def kernel(self, event: Event) -> Work:
        context = self.calls.get(event.correlation) or self.ops.get(event.external)
        if context is None or event.name.startswith("nccl"):
            context = Context(None, "other", event.name)
        return Work(context, event.start_ns, event.end_ns)

    def _leave(self, stack: list[_Frame]) -> None:
        frame = stack.pop()
        self._count(frame, frame.event.end_ns)
        if stack:
            stack[-1].counted_to_ns = frame.event.end_ns

    def _count(self, frame: _Frame, until_ns: int) -> None:
        """An op was busy itself up to now. A range is not work: what is between its ops is not."""
        if frame.event.kind == "op" and until_ns > frame.counted_to_ns:
            self.work.append(Work(frame.context, frame.counted_to_ns, until_ns))

    def _context(self, event: Event, outer: Context, stack: list[_Frame]) -> Context:
        if event.kind == "op":
            context = self._op(event, outer)
            if event.external is not None:
                self.ops[event.external] = context
            return context
        if event.kind == "range" and event.name.startswith(_OPTIMIZER):
            return Context(None, "optimizer", event.name)
        layer = self.layer_of((event.kind, event.name))
        return outer if layer is None else self._range(layer, outer, stack)

    def _range(self, layer: str, outer: Context, stack: list[_Frame]) -> Context:
        inside = outer.occurrence
        if outer.phase == "other":
            self.occurrences.append(Occurrence(layer))
            self._claim_checkpoints(stack)
            return Context(self.occurrences[-1], "forward", layer)
        nested = inside and outer.phase != "backward"
        known = any(each.layer == layer for each in self.occurrences)
        if nested or outer.phase == "optimizer" or not known:
            return outer
        if inside is None or inside.layer != layer:
            inside = Occurrence(layer)
            self.occurrences.append(inside)
        return Context(inside, "recompute", layer)

    def _claim_checkpoints(self, stack: list[_Frame]) -> None:
        for frame in stack:
            frame.encloses += 1
            number = frame.event.sequence
            if number is not None and _CHECKPOINT in frame.event.name:
                alone = self.occurrences[-1] if frame.encloses == 1 else None
                self.maker[frame.event.thread, number] = alone

    def _op(self, event: Event, outer: Context) -> Context:
        if event.name.startswith(_FUNCTION):
            inside_a_layer = outer.phase in ("forward", "recompute")
            return outer if inside_a_layer else self._function(event)
        context = outer if outer.label else Context(None, "other", event.name)
        if context.occurrence:
            context.occurrence.input_bytes = context.occurrence.input_bytes or event.input_bytes
        if event.sequence is None or event.forward_thread:
            return context
        if context.phase == "backward":
            context = context._replace(phase="recompute")
        self.maker[event.thread, event.sequence] = context.occurrence
        return context

    def _function(self, event: Event) -> Context:
        """A function of autograd's, and what runs in it."""
        if _ACCUMULATE in event.name and event.thread in self.last_function:
            return self.last_function[event.thread]
        thread = self.threads.get(event.forward_thread)
        occurrence = None
        if thread is not None and event.sequence is not None:
            occurrence = self.maker.get((thread, event.sequence))
        label = occurrence.layer if occurrence else event.name.removeprefix(_FUNCTION)
        context = Context(occurrence, "backward", label)
        self.last_function[event.thread] = context
        return context
