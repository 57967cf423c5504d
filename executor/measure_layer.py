"""One layer, run alone on a device: its times, and the bytes that it takes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..traces.errors import InputError
from ..traces.trace import LEAST_OF_BACKWARD, LayerCost
from .deferred import collecting, defer_linears
from .layers import Layers, Layout, Replica, WeightCopy
from .left_out import LeftOut, leaving_out, linears_of, unneeded_products
from .linears import Job
from .optimizer_bytes import OptimizerBytes
from .streams import Clock, idle_streams, mark_now
from .values import (
    Value,
    as_leaves,
    detached,
    gradients_of,
    looks_of,
    nbytes_of,
    tensors_of,
)


def _noting(saved: dict[int, int]) -> AbstractContextManager[Any]:
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def bytes_of_weights(
    layout: Layout, own: Mapping[str, nn.Parameter], optimizer: OptimizerBytes
) -> dict[str, int]:
    """What a layer's parameters cost; `own` are those that no earlier layer has."""
    trained = [each for each in own.values() if each.requires_grad]
    slots = (slot for slot in layout.slots if slot.requires_grad)
    return {
        "param_bytes": max(1, layout.nbytes),
        "grad_bytes": sum(slot.stop - slot.start for slot in slots),
        "trainable_params": sum(each.numel() for each in trained),
        **optimizer.of_layer(trained),
    }


class LayerRun:
    """A layer on a device, alone, with weights of its own, to be measured."""

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        layer: int,
        device: torch.device,
        compute: torch.dtype | None,
        autocast: torch.dtype | None,
    ) -> None:
        parameters = layers.parameters_of(layer)
        self.name = f"{layer}.{type(module).__name__}"
        self.layout = Layout.of(parameters, compute)
        copies = {
            slot.name: nn.Parameter(
                _weights(parameters[slot.name], slot.dtype, device),
                requires_grad=slot.requires_grad,
            )
            for slot in self.layout.slots
        }
        self._replica, self._weights = Replica(module, device), WeightCopy(copies)
        self.module = self._replica.bind(self._weights)
        kept = self.module.state_dict()
        self.buffers = {
            name: (each, each._version)
            for name, each in self.module.named_buffers()
            if name in kept
        }
        self.parameters = copies
        self.own = layers.owned_by(layer)
        self.tied_to = layers.trained_with(layer)
        self.device, self.autocast = device, autocast
        self.spread = 0.0
        self.loss: Callable[[Value], Tensor] | None = None
        self.left_out = LeftOut()
        self.passes_gradient = False
        self._given: list[Tensor] = []

    def close(self) -> None:
        """Let go of the weights."""
        self._replica.release(self._weights)
        self.parameters, self._given = {}, []

    def warm_up(self, value: Value, needs: bool, seconds: float) -> None:
        """Keep a GPU at work for so long, without a pause: one that has rested is faster, for some
        tenths of a second by a sixth. All that is timed comes right behind."""
        stop = time.perf_counter() + seconds
        mark = mark_now(self.device)
        while self.device.type == "cuda" and time.perf_counter() < stop:
            self._backward(self._forward(as_leaves(value, needs), None))
            before, mark = mark, mark_now(self.device)
            before.block()
        self._drop_gradients()

    def measure(
        self,
        value: Value,
        needs: bool,
        optimizer: OptimizerBytes,
        repeats: int,
        split: bool,
        warm_s: float = 0.0,
    ) -> tuple[LayerCost, Value, bool]:
        """What the layer costs, what comes out of it, and whether it drew random numbers.

        `split`: also take backward apart into its input's and its weights' part. `warm_s`: how long
        a GPU works before anything is timed.
        """
        saved: dict[int, int] = {}
        drew, saved_bytes = False, 1
        at_most = 0
        # The first run is for what is saved, the second to have gradients, the third for the most.
        for number in range(3):
            leaves = as_leaves(value, needs)
            allocated = _allocated(self.device)
            before = _generator_state(self.device)
            with self._refusing_changed_inputs(leaves):
                output = self._forward(leaves, None if number else saved)
            drew = drew or not torch.equal(before, _generator_state(self.device))
            self._refuse_changed_buffers()
            if not number:
                saved_bytes = max(1, self._saved_bytes(saved, value, detached(output)))
            self._backward(output)
            at_most = _most_allocated(self.device) - allocated
            self.passes_gradient = any(each.requires_grad for each in tensors_of(output))
            boundary = detached(output)
            inputs_grads = sum(each.nbytes for each in gradients_of(leaves) if each is not None)
            del leaves, output
            if not number:
                self._drop_gradients()
                self._try_leaving_out(value, needs)
                self.warm_up(value, needs, warm_s)
        times = self._forward_and_backward_ns(value, needs, repeats)
        self._drop_gradients()
        self.spread = _spread([end - start for start, _, end in times])
        forward_ns = _median([middle - start for start, middle, _ in times])
        backward_ns = _median([end - middle for _, middle, end in times])
        # Gradients are there from before, the output's and the weights': those of a step's later
        # microbatches are added to the first one's.
        known = saved_bytes + nbytes_of(boundary) + inputs_grads
        cost = LayerCost(
            name=self.name,
            forward_ns=forward_ns,
            backward_ns=backward_ns,
            forward_only_ns=self._forward_only_ns(value, repeats),
            recompute_last_ns=self._recompute_last_ns(value, needs, repeats),
            **bytes_of_weights(self.layout, self.own, optimizer),
            output_bytes=max(1, nbytes_of(boundary)),
            saved_bytes=saved_bytes,
            workspace_bytes=max(0, at_most - known),
            tied_to=self.tied_to,
        )
        if split:
            cost = cost.model_copy(update=self._parts(value, needs, backward_ns, repeats))
        return cost, boundary, drew

    def _forward_and_backward_ns(
        self, value: Value, needs: bool, repeats: int
    ) -> list[tuple[int, int, int]]:
        """When each of so many runs began, its backward began, and it ended.

        Work is not waited for between runs, as it is not in a step, and nothing else is done
        there: launching costs no time then.
        """
        clock, marks = Clock(idle_streams([self.device])), []
        for _ in range(repeats + 1):
            start = mark_now(self.device)
            output = self._forward(as_leaves(value, needs), None)
            middle = mark_now(self.device)
            self._backward(output)
            marks.append((start, middle, mark_now(self.device)))
        marks[-1][-1].block()
        return [
            (start.time_ns(clock), middle.time_ns(clock), end.time_ns(clock))
            for start, middle, end in marks[1:]
        ]

    def _forward_only_ns(self, value: Value, repeats: int) -> int:
        """A forward that leaves nothing for backward, so that a loss need not make gradients."""

        def forward() -> None:
            with torch.no_grad(), self._casting():
                output = detached(self.module(value))  # As a step does: weights in it, too.
                if self.loss is not None:
                    self.loss(output)

        return self._median_ns(forward, repeats)

    def _try_leaving_out(self, value: Value, needs: bool) -> None:
        """Find what a recompute need not do where nothing behind it reads the output."""
        if self.loss is None:
            self.left_out = LeftOut(self._unneeded_products(value, needs), looks_of(value))

    def _unneeded_products(self, value: Value, needs: bool) -> tuple[str, ...]:
        leaves: Value = None

        def forward() -> Value:
            nonlocal leaves
            leaves = as_leaves(value, needs)
            with self._same_numbers():
                return self._forward(leaves, None)

        def backward(output: Value) -> list[Tensor]:
            self._backward(output)
            grads = [*gradients_of(leaves), *(each.grad for each in self.parameters.values())]
            self._drop_gradients()
            return [each for each in grads if each is not None]

        return unneeded_products(self.module, forward, backward)

    @contextmanager
    def _same_numbers(self) -> Iterator[None]:
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            yield

    def _recompute_last_ns(self, value: Value, needs: bool, repeats: int) -> int | None:
        """A forward for backward alone, without what is left out of it; None: that is nothing."""
        if not self.left_out.names:
            return None
        linears = linears_of(self.module, self.left_out.names)

        def forward() -> None:
            with leaving_out(linears):
                self._forward(as_leaves(value, needs), None)

        return self._median_ns(forward, repeats)

    def _median_ns(self, run: Callable[[], None], repeats: int) -> int:
        """The median time of so many runs after one to warm up."""
        clock, marks = Clock(idle_streams([self.device])), []
        for _ in range(repeats + 1):
            start = mark_now(self.device)
            run()
            marks.append((start, mark_now(self.device)))
        marks[-1][-1].block()
        return _median([end.time_ns(clock) - start.time_ns(clock) for start, end in marks[1:]])

    def _parts(self, value: Value, needs: bool, backward_ns: int, repeats: int) -> dict[str, int]:
        """Backward's parts: its linear layers' weights' part is what can be put off."""
        defer_linears(self.module)
        clock, marks = Clock(idle_streams([self.device])), []
        for _ in range(repeats + 1):
            jobs: list[Job] = []
            with collecting(jobs):
                output = self._forward(as_leaves(value, needs), None)
            start = mark_now(self.device)
            self._backward(output)
            middle = mark_now(self.device)
            for job in jobs:
                job()
            jobs.clear()  # They and the graph hold each other.
            marks.append((start, middle, mark_now(self.device)))
        marks[-1][-1].block()
        self._drop_gradients()
        times = [[mark.time_ns(clock) for mark in each] for each in marks[1:]]
        of_input = _median([middle - start for start, middle, _ in times])
        of_weights = _median([end - middle for _, middle, end in times])
        if of_input + of_weights < LEAST_OF_BACKWARD * backward_ns:
            # Two measurements of the same work: what disturbs one only makes it longer.
            backward_ns = of_input + of_weights
        return {
            "backward_ns": backward_ns,
            "backward_input_ns": of_input,
            "backward_weight_ns": of_weights,
        }

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _forward(self, leaves: Value, saved: dict[int, int] | None) -> Value:
        """The output; where `saved` is given, the bytes of what is saved go there by address."""
        noting = nullcontext() if saved is None else _noting(saved)
        with torch.enable_grad(), noting, self._casting():
            output = self.module(leaves)
            return output if self.loss is None else self.loss(output)

    def _casting(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, self.autocast is not None
        )

    def _backward(self, output: Value) -> None:
        """In this thread, as a step does it."""
        outputs = [each for each in tensors_of(output) if each.requires_grad]
        if outputs:
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.backward(outputs, self._gradients(outputs))

    def _gradients(self, outputs: list[Tensor]) -> list[Tensor]:
        """Gradients of outputs, the same ones every time: a loss's is 1, others are random.

        Of numbers that are all alike a GPU makes products up to a tenth faster: it needs less
        power, and its clock stays high.
        """
        shapes = [each.shape for each in outputs]
        if [each.shape for each in self._given] != shapes:
            drawn = torch.Generator(self.device).manual_seed(0)
            self._given = [torch.ones_like(each) for each in outputs]
            for each in self._given:
                if each.ndim:
                    each.normal_(generator=drawn)
        return self._given

    def _saved_bytes(self, saved: dict[int, int], value: Value, boundary: Value) -> int:
        known = [*tensors_of(value), *tensors_of(boundary), *self.parameters.values()]
        for tensor in known:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())

    @contextmanager
    def _refusing_changed_inputs(self, leaves: Value) -> Iterator[None]:
        """What a layer gets is kept for its recompute, which has to get the same."""
        inputs = tensors_of(leaves)
        versions = [each._version for each in inputs]
        try:
            yield
            changed = versions != [each._version for each in inputs]
        except RuntimeError as error:
            changed = "a leaf Variable that requires grad is being used in an in-place" in str(
                error
            )
            if not changed:
                raise
        if changed:
            raise InputError(
                f"layers: {self.name} changes its input in place, which another run of it is "
                "to get as it was; make a new tensor instead, as with inplace=False"
            )

    def _refuse_changed_buffers(self) -> None:
        for name, (buffer, version) in self.buffers.items():
            now = self.module.get_buffer(name)
            if now is not buffer or now._version != version:
                raise InputError(
                    f"layers: {self.name}: its forward changes the buffer {name!r}, which "
                    "microbatches and recompute would change several times a step; "
                    "keep such values outside of the layers"
                )


def _weights(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a parameter; of one without memory, small random numbers."""
    if parameter.is_meta:
        return torch.empty(parameter.shape, dtype=dtype, device=device).normal_(std=0.02)
    return parameter.detach().to(device, dtype, copy=True)


def _spread(values: list[int]) -> float:
    """How far apart the middle half of the values is, as a share of their median."""
    ordered, quarter = sorted(values), len(values) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / max(1, _median(values))


def _median(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


def _allocated(device: torch.device) -> int:
    """Bytes allocated on a GPU, from where its peak is counted anew; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _most_allocated(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
