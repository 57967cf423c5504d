"""Compute: the ops F, R, B, I and W on a device."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..policies.op import Op
from .deferred import collecting
from .left_out import LeftOut, leaving_out, linears_of
from .linears import Job
from .pace import BACKWARD, Pace
from .values import Gradients, Value, as_leaves, detached, gradients_of, looks_of, tensors_of

LossFunction = Callable[[Any, Any], Tensor]


@dataclass
class Graph:
    """What a forward or recompute leaves for its backward."""

    leaves: Value
    outputs: list["Root | None"]
    layers: list[nn.Module]
    jobs: list[Job] = field(default_factory=list)


Root = Tensor | GradientEdge
"""Where backward starts: an output, or its place in the graph, which needs none of its memory."""


_UPDATE = -1
"""Stands where a microbatch does: an update is of none."""


class Randomness:
    """Makes layers draw the same numbers whenever they run for the same step and microbatch.

    Only layers that draw any are touched. The generator is the process's (CPU) or the device's, so
    such layers take turns on it.
    """

    def __init__(self, seed: int, updates_draw: bool = False) -> None:
        self.seed = seed
        self.updates_draw = updates_draw
        self.draws: set[int] = set()
        self._lock = threading.Lock()

    @contextmanager
    def fixed(self, layer: int, step: int, microbatch: int, device: torch.device) -> Iterator[None]:
        """Numbers drawn in here depend on these arguments alone."""
        if layer not in self.draws:
            yield
            return
        with self._seeded(layer_seed(self.seed, layer, step, microbatch), device):
            yield

    @contextmanager
    def of_update(self, layer: int, step: int, device: torch.device) -> Iterator[None]:
        """Numbers that an update of a layer draws, as for stochastic rounding, are its own too."""
        if not self.updates_draw:
            yield
            return
        with self._seeded(layer_seed(self.seed, layer, step, _UPDATE), device):
            yield

    @contextmanager
    def _seeded(self, seed: int, device: torch.device) -> Iterator[None]:
        with self._lock:
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            yield


def _tell_where(error: Exception, op: Op, layer: int, module: nn.Module) -> None:
    name = type(module).__name__
    error.add_note(f"in layer {layer} ({name}), microbatch {op.microbatch}, op {op}")


def _root(output: Tensor, is_loss: bool) -> Root | None:
    """Of a loss itself, which needs no gradient given; of an output without a graph none."""
    if not output.requires_grad:
        return None
    return output if is_loss else get_gradient_edge(output)


def layer_seed(seed: int, layer: int, step: int, microbatch: int) -> int:
    """The seed from which a layer draws for one microbatch of one step."""
    text = f"{seed} {layer} {step} {microbatch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % 2**63


class Computer:
    """Runs ranges of layers on one device."""

    def __init__(
        self,
        device: torch.device,
        loss_fn: LossFunction,
        randomness: Randomness,
        autocast: torch.dtype | None,
        needs_gradient: list[bool],
        left_out: Mapping[int, LeftOut] = MappingProxyType({}),
    ) -> None:
        self.device = device
        self._loss_fn = loss_fn
        self._randomness = randomness
        self._autocast = autocast
        self._needs_gradient = needs_gradient
        self._left_out = left_out
        self._linears: dict[int, list[nn.Linear]] = {}  # Of the one module of a layer here.
        self._pace = Pace(device)
        self._backwards_noted = 0

    def forward(
        self, op: Op, step: int, modules: list[nn.Module], value: Value, keep: set[int]
    ) -> dict[int, Value]:
        """Run without saving anything; returns the outputs of the layers in `keep`."""
        kept = {}
        with torch.no_grad():
            for layer, output in self._run(op, step, modules, value):
                if layer in keep:
                    kept[layer] = detached(output)
        return kept

    def loss_of(self, output: Value, target: Value) -> Tensor:
        """The loss of a microbatch's output."""
        with self._casting():
            return self._loss_fn(output, target)

    def forward_with_graph(
        self,
        op: Op,
        step: int,
        modules: list[nn.Module],
        value: Value,
        finish: Callable[[Value], Value],
        defer: bool,
        is_loss: bool,
        is_read: bool = True,
    ) -> tuple[Graph, Value]:
        """Run and keep the graph; `finish` makes the last output, such as the loss of it.

        `is_loss`: backward starts from that output, without a gradient given.
        `is_read`: somebody reads that output; else what only makes it is left out.
        """
        needs = op.first > 0 and self._needs_gradient[op.first - 1]
        leaves = as_leaves(value, needs)
        jobs: list[Job] = []
        with torch.enable_grad(), collecting(jobs) if defer else nullcontext():
            for layer, output in self._run(op, step, modules, leaves, is_read):
                if layer < op.stop - 1:
                    self._note_when_behind_is_launched(output)
            output = finish(output)
        roots = [_root(each, is_loss) for each in tensors_of(output)]
        return Graph(leaves, roots, modules, jobs), output

    def backward(self, op: Op, graph: Graph, grads: Gradients) -> Gradients:
        """Run the graph backward; returns the gradients of its leaves."""
        pairs = [
            (root, grad)
            for root, grad in zip(graph.outputs, grads, strict=True)
            if root is not None and (grad is not None or isinstance(root, Tensor))
        ]
        if pairs:
            roots, given = zip(*pairs, strict=True)
            self._backwards_noted = 0
            # In this thread: to hand each op to autograd's own, and to be woken by it, takes time.
            with torch.autograd.set_multithreading_enabled(False), self._told(op, graph.layers):
                torch.autograd.backward(roots, given)
            self._pace.launched(BACKWARD * max(1, len(graph.layers) - self._backwards_noted))
        result = gradients_of(graph.leaves)
        graph.outputs, graph.leaves, graph.layers = [], None, []
        return result

    @contextmanager
    def _told(self, op: Op, modules: list[nn.Module]) -> Iterator[None]:
        """Where backward goes wrong, in which layer: of those behind it all has been launched."""
        try:
            yield
        except Exception as error:
            place = max(0, len(modules) - 1 - self._backwards_noted)
            _tell_where(error, op, op.first + place, modules[place])
            raise

    def _note_when_behind_is_launched(self, output: Value) -> None:
        """Backward of several layers is paced layer by layer: as one, whatever is launched behind
        it would wait for its end, and the device then for that."""

        def launched(grad: Tensor) -> None:
            self._pace.wait()
            self._pace.launched(BACKWARD)
            self._backwards_noted += 1

        # Not what is passed on as it came, or a parameter: they get gradients from elsewhere too.
        through = next((each for each in tensors_of(output) if each.grad_fn is not None), None)
        if through is not None:
            through.register_hook(launched)  # type: ignore[no-untyped-call]

    def _run(
        self, op: Op, step: int, modules: list[nn.Module], value: Value, is_read: bool = True
    ) -> Iterator[tuple[int, Value]]:
        for layer, module in zip(range(op.first, op.stop), modules, strict=True):
            try:
                self._pace.wait()
                numbers = self._randomness.fixed(layer, step, op.microbatch, self.device)
                needed = is_read or layer < op.stop - 1
                sparing = nullcontext() if needed else self._sparing(layer, module, value)
                with numbers, self._casting(), sparing:
                    value = module(value)
                self._pace.launched(1)
            except Exception as error:
                _tell_where(error, op, layer, module)
                raise
            yield layer, value

    def _sparing(self, layer: int, module: nn.Module, value: Value) -> AbstractContextManager[None]:
        """In here a layer leaves out what need not be made where nobody reads its output."""
        found = self._left_out.get(layer)
        if found is None or not found.names or looks_of(value) != found.inputs:
            return nullcontext()
        if layer not in self._linears:
            self._linears[layer] = linears_of(module, found.names)
        return leaving_out(self._linears[layer])

    def _casting(self) -> Any:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)
