"""A trace of the user's own layers, measured once and briefly, so that a policy can cut."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..traces.errors import InputError
from ..traces.trace import LayerCost, Trace
from .compute import LossFunction
from .layers import Layers, Layout, Replica, WeightCopy
from .values import Value, as_leaves, batch_size, detached, map_tensors, nbytes_of, tensors_of


def measure_layers(
    layers: Layers,
    loss_fn: LossFunction,
    inputs: Value,
    targets: Value,
    device: torch.device,
    *,
    compute: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    state_bytes: int = 8,
    repeats: int = 1,
) -> tuple[Trace, set[int]]:
    """Run each layer on one microbatch, alone; returns the trace and the layers that draw numbers.

    Times are the median of `repeats` runs after one to warm up where there are several. Every
    tensor that is kept counts at least a byte. `state_bytes` is the optimizer's state per trained
    parameter, master copy included.
    """
    value = map_tensors(lambda tensor: tensor.to(device), inputs)
    goal = map_tensors(lambda tensor: tensor.to(device), targets)
    needs = [False, *layers.needs_gradient()]
    costs, draws = [], set()
    for layer, module in enumerate(layers.modules):
        run = _Run(module, layers, layer, device, compute, autocast)
        if layer == len(layers) - 1:
            run.finish = lambda output: loss_fn(output, goal)
        try:
            cost, value, drew = run.measure(value, needs[layer], state_bytes, repeats)
        except Exception as error:
            name = type(module).__name__
            error.add_note(f"in layer {layer} ({name}), while it was measured")
            raise
        costs.append(cost)
        if drew:
            draws.add(layer)
    trace = Trace(
        name="layers",
        device=str(device),
        provenance="measured by the trainer, once",
        microbatch_tokens=batch_size(inputs),
        layers=tuple(costs),
    )
    return trace, draws


class _Run:
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
                parameters[slot.name].detach().to(device, slot.dtype, copy=True),
                requires_grad=slot.requires_grad,
            )
            for slot in self.layout.slots
        }
        replica = Replica(module, device)
        self.module = replica.bind(WeightCopy(copies))
        kept = self.module.state_dict()
        self.buffers = {
            name: (each, each._version)
            for name, each in self.module.named_buffers()
            if name in kept
        }
        self.parameters = copies
        self.own = layers.owned_by(layer)
        tied = layers.tied_to(layer)
        self.tied_to = min(tied) if tied else None
        self.device, self.autocast = device, autocast
        self.finish: Callable[[Value], Any] = lambda output: output

    def measure(
        self, value: Value, needs: bool, state_bytes: int, repeats: int
    ) -> tuple[LayerCost, Value, bool]:
        times: list[tuple[int, int]] = []
        drew = False
        for _ in range(repeats + (repeats > 1)):
            leaves = as_leaves(value, needs)
            before = _generator_state(self.device)
            saved: dict[int, int] = {}
            start = self._now()
            output = self._forward(leaves, saved)
            middle = self._now()
            drew = drew or not torch.equal(before, _generator_state(self.device))
            self._refuse_changed_buffers()
            self._backward(output)
            times.append((middle - start, self._now() - middle))
            boundary = detached(output)
        for parameter in self.parameters.values():
            parameter.grad = None
        forward_ns, backward_ns = (
            sorted(each)[len(each) // 2] for each in zip(*times[-repeats:], strict=True)
        )
        trained = [each for each in self.own.values() if each.requires_grad]
        grads = [slot for slot in self.layout.slots if slot.requires_grad]
        cost = LayerCost(
            name=self.name,
            forward_ns=forward_ns,
            backward_ns=backward_ns,
            param_bytes=max(1, self.layout.nbytes),
            grad_bytes=sum(slot.stop - slot.start for slot in grads),
            optimizer_bytes=state_bytes * sum(each.numel() for each in trained),
            trainable_params=sum(each.numel() for each in trained),
            output_bytes=max(1, nbytes_of(boundary)),
            saved_bytes=max(1, self._saved_bytes(saved, value, boundary)),
            tied_to=self.tied_to,
        )
        return cost, boundary, drew

    def _forward(self, leaves: Value, saved: dict[int, int]) -> Value:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        casting = torch.autocast(
            self.device.type, self.autocast or torch.bfloat16, self.autocast is not None
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with torch.enable_grad(), hooks, casting:
            return self.finish(self.module(leaves))

    def _backward(self, output: Value) -> None:
        outputs = [each for each in tensors_of(output) if each.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])

    def _saved_bytes(self, saved: dict[int, int], value: Value, boundary: Value) -> int:
        known = [*tensors_of(value), *tensors_of(boundary), *self.parameters.values()]
        for tensor in known:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(saved.values())

    def _refuse_changed_buffers(self) -> None:
        for name, (buffer, version) in self.buffers.items():
            now = self.module.get_buffer(name)
            if now is not buffer or now._version != version:
                raise InputError(
                    f"layers: {self.name}: its forward changes the buffer {name!r}, which "
                    "microbatches and recompute would change several times a step; "
                    "keep such values outside of the layers"
                )

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter_ns()


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()
