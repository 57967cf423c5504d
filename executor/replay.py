"""Replay: a layer's recompute and backward, recorded once and run again by one call each.

On a GPU they are CUDA graphs, which spare Python and the driver the launch of each kernel. A graph
reads and writes the same memory again and again, so a layer's weights are copied to a slot when its
visit begins, and its gradients from there when it ends. On the CPU the same is done by running the
layer itself.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..policies.op import Op
from .compute import Layer
from .kinds import kind_of
from .layers import Layers, Layout, Replica, WeightCopy
from .streams import CudaStream
from .values import Value, map_tensors

WARM_UP = 2
"""How often a layer runs before it is recorded: libraries choose kernels and take memory then."""


Casting = Callable[[], AbstractContextManager[Any]]
"""What layers run in, such as autocast."""

MOST = 4
"""Layers of a kind that are replayed in a visit, at most: each takes what a backward needs."""


_one_at_a_time = threading.Lock()


class Recorder:
    """Records work on one device. All that it records has memory together."""

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            # Of its own: to the stream that it is replayed on others add meanwhile.
            self._stream = CudaStream(device, urgent=True).stream

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work; returns what does it again. On the CPU that is the work itself."""
        if self._stream is None:
            work()
            return work
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, torch.cuda.stream(self._stream):
            # Threads that are not a trainer's may do meanwhile what this one may not.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


class Slot:
    """A place for one layer of a kind: its weights, input, output and gradients."""

    def __init__(
        self, module: nn.Module, layout: Layout, value: Tensor, needs: bool, casting: Casting
    ) -> None:
        device = value.device
        self._flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        weights = WeightCopy(layout.parameters(self._flat), self._flat)
        trained = {name: p for name, p in weights.parameters.items() if p.requires_grad}
        self._layout = Layout.of(trained, None)
        self._sums = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
        for name, each in self._layout.views(self._sums).items():
            trained[name].grad = each
        self.module, self._casting = Replica(module, device).bind(weights), casting
        self.leaf = value.detach().requires_grad_(needs)
        self.output, self.given = value, value
        self.holds: WeightCopy | None = None
        self.chained = False
        self.replay_forward: Callable[[], None]
        self.replay_backward: Callable[[], None]

    def run(self) -> None:
        """The layer forward, leaving its graph."""
        with torch.enable_grad(), self._casting():
            self.output = self.module(self.leaf)

    def run_back(self) -> None:
        """Its backward, which adds to the gradients of the weights."""
        self.leaf.grad = None
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.backward([get_gradient_edge(self.output)], [self.given])

    def bind(self, weights: WeightCopy) -> None:
        """Hold these weights, without gradients yet."""
        assert weights.flat is not None
        self._flat.copy_(weights.flat)
        self._sums.zero_()
        self.holds, weights.slot = weights, self

    def settle(self) -> None:
        """Give the gradients to the weights held here, and be free."""
        weights, self.holds = self.holds, None
        assert weights is not None
        weights.slot = None
        for name, each in self._layout.views(self._sums.clone()).items():
            parameter = weights.parameters[name]
            parameter.grad = each if parameter.grad is None else parameter.grad.add_(each)

    def forward(self, value: Tensor) -> Tensor:
        """Replay the forward on this input."""
        self.chained = value.data_ptr() == self.leaf.data_ptr()
        if not self.chained:
            self.leaf.detach().copy_(value)
        self.replay_forward()
        return self.output.detach()

    def backward(self, grad: Tensor) -> Tensor | None:
        """Replay the backward from this gradient; returns the input's."""
        if grad.data_ptr() != self.given.data_ptr():
            self.given.copy_(grad)
        self.replay_backward()
        result = self.leaf.grad
        # Whoever reads it may do so when the next microbatch is here; but not the slot before.
        return result if result is None or self.chained else result.clone()


class Chain:
    """Slots for successive layers of a kind, which run forward in order, and then back.

    What one has saved lies where a later one's passing memory was, and the other way around, so
    they must run in that order, one microbatch at a time. `depth` slots have run forward and not
    back.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        value: Tensor,
        needs: bool,
        casting: Casting,
        count: int,
    ) -> None:
        self.depth = 0
        self.slots: list[Slot] = []
        recorder = Recorder(value.device)
        given = torch.zeros_like(value)
        leaf = value.detach().clone()
        for _ in range(count):
            slot = Slot(module, layout, leaf, needs, casting)
            self._warm_up(slot, given)
            slot.replay_forward = recorder.record(slot.run)
            if slot.output.shape != value.shape or slot.output.dtype != value.dtype:
                raise NotImplementedError("a layer whose output is not like its input")
            leaf = slot.output.detach()
            self.slots.append(slot)
        for slot in reversed(self.slots):
            slot.given = given
            slot.replay_backward = recorder.record(slot.run_back)
            given = slot.leaf.grad if slot.leaf.grad is not None else given

    @staticmethod
    def _warm_up(slot: Slot, given: Tensor) -> None:
        slot.given = given
        for _ in range(WARM_UP):
            slot.run()
            slot.run_back()
        # Nothing of these graphs is to be met again: what adds up gradients remembers its stream.
        slot.output, slot.leaf.grad = given, None

    def fits(self, value: Value) -> bool:
        """Whether this is an input such as was recorded."""
        like = self.slots[0].leaf
        return isinstance(value, Tensor) and value.shape == like.shape and value.dtype == like.dtype

    def slot_of(self, weights: WeightCopy) -> Slot | None:
        """The slot with these weights, if it is its turn to run forward."""
        if self.depth >= len(self.slots):
            return None
        slot = self.slots[self.depth]
        if slot.holds is None and weights.slot is None:
            slot.bind(weights)
        return slot if slot.holds is weights else None


class _Replay(torch.autograd.Function):
    """A layer of which both ways are replayed.

    `anchor` wants a gradient, as the layer's weights do, whose gradients autograd does not see.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, slot: Slot, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.both = chain, slot
        chain.depth += 1
        return slot.forward(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain, slot = ctx.both
        chain.depth -= 1
        assert chain.slots[chain.depth] is slot, "recorded layers run back in order"
        return None, None, slot.backward(grad), None


class Replays:
    """The chains of one device, one for each kind of layers.

    ops: that device's; casting: what its layers run in. Of a kind at most `MOST` in a visit
    are replayed, for each takes memory.
    Inputs are noted as they come in a step; `record`, between two steps, makes chains for them.
    """

    def __init__(
        self, layers: Layers, ops: Iterable[Op], compute: torch.dtype | None, casting: Casting
    ) -> None:
        self._layers, self._compute, self._casting = layers, compute, casting
        self._needs = [False, *layers.needs_gradient()]
        self._kinds = [kind_of(layers, n, self._needs[n], ()) for n in range(len(layers))]
        # Others have no backward, or none like them.
        alike = Counter(kind for n, kind in enumerate(self._kinds) if self._needs[n + 1])
        self._counts: Counter[Hashable] = Counter()
        for first, stop in {(op.first, op.stop) for op in ops if op.kind == "B"}:
            self._counts |= Counter(kind for kind in self._kinds[first:stop] if alike[kind] > 1)
        self._noted: dict[Hashable, tuple[int, Value]] = {}
        self._chains: dict[Hashable, Chain | None] = {}
        self._anchors: dict[torch.device, Tensor] = {}

    def module(self, layer: int, module: Layer, weights: WeightCopy) -> Layer:
        """What runs a layer with a graph for its backward: a replay where there is one for it."""
        kind = self._kinds[layer]
        if self._counts[kind] < 1 or weights.flat is None:
            return module

        def run(value: Value) -> Any:
            chain = self._chains.get(kind)
            if kind not in self._chains:
                self._noted.setdefault(kind, (layer, map_tensors(torch.empty_like, value)))
            slot = chain.slot_of(weights) if chain is not None and chain.fits(value) else None
            if chain is None or slot is None:
                return module(value)
            return _Replay.apply(chain, slot, value, self._anchor(value.device))  # type: ignore[no-untyped-call]

        run.__name__ = type(module).__name__
        return run

    @property
    def waits(self) -> bool:
        """Whether there is anything to record."""
        return bool(self._noted)

    def record(self) -> None:
        """Record what was noted. Nothing else may run on the device meanwhile.

        Of memory that another stream reads, torch's allocator forgets that while anybody records.
        """
        for kind, (layer, value) in self._noted.items():
            self._chains[kind] = self._recorded(layer, value)
        self._noted.clear()

    def _recorded(self, layer: int, value: Value) -> Chain | None:
        try:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise NotImplementedError("its input is no single tensor")
            layout = Layout.of(self._layers.parameters_of(layer), self._compute)
            module, count = self._layers.modules[layer], self._counts[self._kinds[layer]]
            return Chain(
                module, layout, value.zero_(), self._needs[layer], self._casting, min(MOST, count)
            )
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
            warnings.warn(f"graphs: layer {layer} runs without one: {why}", stacklevel=2)
            return None

    def _anchor(self, device: torch.device) -> Tensor:
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]
