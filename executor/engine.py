"""StepEngine: does what each task of a program says, for one step of one trainer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..policies.op import Op
from ..traces.errors import InputError
from ..traces.timeline import COMPUTE_KINDS, KINDS
from .compute import Graph
from .gradients import GradientBook
from .host_pool import HostPool
from .layers import WeightCopy
from .machinery import Machinery
from .program_tables import ACTIVATIONS, GRADIENTS, SAVED, ProgramTables
from .store import Key, Store, poison
from .streams import CpuMark, mark_now
from .values import (
    Value,
    copied,
    copy_each,
    detached,
    moved,
    read_on_current_stream,
    tensors_of,
)
from .weights import begin_upload, refresh_resident, upload_part

HOST = torch.device("cpu")


class StepEngine:
    """Runs the tasks of one step."""

    def __init__(
        self,
        tables: ProgramTables,
        machinery: Machinery,
        step: int,
        inputs: list[Value],
        targets: list[Value],
        shares: list[float],
        poison: bool = False,
    ) -> None:
        self.tables = tables
        self._program = tables.program
        self._machinery = machinery
        self._step = step
        self._inputs, self._targets, self._parts = inputs, targets, shares
        self._store = Store(tables.lifetimes, poison)
        # Not a method of this one: they would hold each other, and all that outlives a step.
        self._spent = partial(_spend, machinery.on_host, poisoned=poison)
        self._book = GradientBook(machinery.layers, tables.feeds, self._spent)
        self._settings = machinery.masters.settings()
        self._scale: Tensor | None = None
        self._poison = poison
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._updated: dict[int, WeightCopy] = {}
        self._on_devices: dict[int, Tensor] = {}
        self.losses: dict[int, float] = {}

    def run(self, task: int) -> None:
        """Do what task number `task` says, and let go of what it was the last to use."""
        kind = KINDS[self._program.kind[task]]
        if kind in COMPUTE_KINDS:
            self._compute(kind, task)
        else:
            getattr(self, f"_{kind}")(task)
        # Gradients that leave are taken off the weights here, which may be gone by then.
        for transfer, layer in self.tables.gradients_of.get(task, ()):
            weights = self._weights(int(self._program.source[task]), layer)
            self._staged[transfer] = weights.take_gradients()
        for key, value in self._store.end(task):
            if key.pool == len(self._machinery.devices):
                self._has_waited(value, self._place(task)[0])
        for device, layer in self.tables.weights_end.get(task, ()):
            dropped = self._machinery.weights[device].drop(layer)
            update = self.tables.update_of.get((task, layer))
            if update is not None:
                self._updated[update] = dropped
            elif self._poison and dropped.flat is not None:
                dropped.flat.fill_(255)

    def fetch_loss(self, task: int) -> None:
        """Have the loss of the microbatch that a forward to the end was for, which is done."""
        number = int(self._program.microbatch[task])
        self.losses[number] = float(self._on_devices[number])

    def close(self) -> None:
        """Let go of everything."""
        self._store.clear()

    # ---- compute

    def _op(self, kind: str, task: int) -> Op:
        program = self._program
        return Op(
            kind, int(program.first[task]), int(program.stop[task]), int(program.microbatch[task])
        )

    def _compute(self, kind: str, task: int) -> None:
        op, device = self._op(kind, task), int(self._program.source[task])
        if kind in "FR":
            self._forward(op, device, task)
        elif kind in "BI":
            self._backward(op, device)
        else:
            graph = self._store.get(Key(SAVED, device, op.first, op.microbatch))
            for job in graph.jobs:
                job()
            graph.jobs.clear()

    def _forward(self, op: Op, device: int, task: int) -> None:
        machinery, computer = self._machinery, self._machinery.computers[device]
        modules = machinery.weights[device].modules(op.first, op.stop)
        value = self._input(op, device)
        keep = {layer for label, layer in self.tables.allocs[task] if label == ACTIVATIONS}
        if (SAVED, op.first) not in self.tables.allocs[task]:
            kept = computer.forward(op, self._step, modules, value, keep | {op.stop - 1})
            output = kept.pop(op.stop - 1) if op.stop - 1 not in keep else kept[op.stop - 1]
            if self._is_last(op):
                self._weighted_loss(op, device, output)
        else:
            graph, output = computer.forward_with_graph(
                op,
                self._step,
                modules,
                value,
                self._finish(op, device),
                self.tables.splits,
                self._is_last(op),
                is_read=op.kind != "R" or self._is_last(op),
            )
            self._store.put(Key(SAVED, device, op.first, op.microbatch), graph)
            kept = {op.stop - 1: detached(output)}
        for layer in keep:
            self._store.put(Key(ACTIVATIONS, device, layer, op.microbatch), kept[layer])

    def _input(self, op: Op, device: int) -> Value:
        if op.first == 0:
            return moved(self._inputs[op.microbatch], self._machinery.devices[device])
        fetched = op.kind == "R" and self._program.rules.activations == "host"
        return self._store.get(Key(ACTIVATIONS, device, op.first - 1, op.microbatch, fetched))

    def _is_last(self, op: Op) -> bool:
        return op.stop == len(self._machinery.layers)

    def _target(self, op: Op, device: int) -> Value:
        return moved(self._targets[op.microbatch], self._machinery.devices[device])

    def _finish(self, op: Op, device: int) -> Any:
        if not self._is_last(op):
            return lambda output: output

        return partial(self._weighted_loss, op, device)

    def _weighted_loss(self, op: Op, device: int, output: Value) -> Tensor:
        """A microbatch's part of the loss. What its forward made is what is read, and no recompute:
        that may be under way then."""
        try:
            loss = self._machinery.computers[device].loss_of(output, self._target(op, device))
        except Exception as error:
            error.add_note(f"in the loss of microbatch {op.microbatch}")
            raise
        if loss.ndim:
            raise InputError(
                f"loss_fn: must return a mean, without dimensions; got {tuple(loss.shape)}"
            )
        loss = loss * self._parts[op.microbatch]
        self._on_devices.setdefault(op.microbatch, loss.detach())
        return loss

    def _backward(self, op: Op, device: int) -> None:
        graph: Graph = self._store.get(Key(SAVED, device, op.first, op.microbatch))
        if self._is_last(op):
            grads: list[Tensor | None] = [None]
        else:
            grads = self._store.get(Key(GRADIENTS, device, op.stop - 1, op.microbatch))
        result = self._machinery.computers[device].backward(op, graph, grads)
        if op.first > 0:
            self._store.put(Key(GRADIENTS, device, op.first - 1, op.microbatch), result)

    # ---- transfers

    def _send(self, task: int) -> None:
        source, target = int(self._program.source[task]), int(self._program.target[task])
        if task in self._staged:
            self._send_gradients(task, target)
            return
        if self._program.microbatch[task] < 0:
            self._send_shared(task, source, target)
            return
        ((label, layer),) = self.tables.allocs[task]
        microbatch = int(self._program.microbatch[task])
        value = self._store.get(Key(label, source, layer, microbatch))
        machinery = self._machinery
        copy = copied(value, machinery.devices[target], reader=machinery.streams[target])
        self._store.put(Key(label, target, layer, microbatch), copy, owned=True)

    def _send_gradients(self, task: int, target: int) -> None:
        """Gradients of a visit to the device that updates their layer."""
        copies = self._copies(self._staged.pop(task), target)
        for each in copies.values():
            self._machinery.update_streams[target].reads(each)
        self._book.add(int(self._program.first[task]), copies, task)

    def _copies(self, grads: dict[str, Tensor], target: int) -> dict[str, Tensor]:
        device, reader = self._machinery.devices[target], self._machinery.streams[target]
        return {name: copied(each, device, reader=reader) for name, each in grads.items()}

    def _send_shared(self, task: int, source: int, target: int) -> None:
        """Gradients of shared parameters to their owner's device, or their new values back."""
        machinery, layer = self._machinery, int(self._program.first[task])
        if layer in machinery.weights[source].held():
            names = machinery.layers.shared_by(layer)
            grads = self._weights(source, layer).take_gradients(names)
            self._book.add(layer, self._copies(grads, target), task)
        else:
            refresh_resident(machinery.layers, layer, self._weights(target, layer))

    def _offload(self, task: int) -> None:
        device, layer, microbatch = self._place(task)
        value = self._store.get(Key(ACTIVATIONS, device, layer, microbatch))
        copy = self._machinery.on_host.copy(value)
        host = len(self._machinery.devices)
        self._store.put(Key(ACTIVATIONS, host, layer, microbatch), copy)

    def _has_waited(self, value: Value, device: int) -> None:
        """A value waited on the host for one fetch, whose copy may still be under way."""
        mark = mark_now(self._machinery.devices[device])
        if self._poison:
            mark.block()
            poison(value)
        self._machinery.on_host.give_back(value, mark)

    def _fetch(self, task: int) -> None:
        device, layer, microbatch = self._place(task)
        host = len(self._machinery.devices)
        value = self._store.get(Key(ACTIVATIONS, host, layer, microbatch))
        machinery = self._machinery
        copy = copied(value, machinery.devices[device], reader=machinery.streams[device])
        self._store.put(Key(ACTIVATIONS, device, layer, microbatch, True), copy, owned=True)

    def _place(self, task: int) -> tuple[int, int, int]:
        """(device, layer, microbatch) of a transfer between a device and the host."""
        program = self._program
        device = max(int(program.source[task]), int(program.target[task]))
        return device, int(program.first[task]), int(program.microbatch[task])

    def _upload(self, task: int) -> None:
        device, layer, _ = self._place(task)
        machinery = self._machinery
        if self._program.rules.weights == "resident":
            if layer in machinery.host_copies:  # Else nothing of it has changed.
                read = machinery.host_copies[layer].named(self._step)
                weights = self._weights(device, layer).parameters
                copy_each([(weights[name].data, each) for name, each in read.items()])
        elif task in self.tables.parts:
            self._upload_weights(task, device, layer)
        else:
            machinery.transit.up(layer, machinery.devices[device], machinery.streams[device])

    def _upload_weights(self, task: int, device: int, layer: int) -> None:
        machinery = self._machinery
        source, part = machinery.host_copies[layer], int(self._program.part[task])
        if part == 0:
            weights = begin_upload(
                source.layout, machinery.devices[device], machinery.streams[device]
            )
            machinery.weights[device].keep(layer, weights)
        weights = machinery.weights[device].newest(layer)
        upload_part(weights, source.flat(self._step), part, self.tables.parts[task])

    def _download(self, task: int) -> None:
        device, layer, _ = self._place(task)
        if task in self.tables.weights_down:
            part, parts = int(self._program.part[task]), self.tables.weights_down[task]
            self._machinery.transit.weights_down(layer, self._step, part, parts)
            return
        if task in self.tables.states_down:
            self._machinery.transit.states_down(layer)
            return
        grads, pool = self._staged.pop(task), self._machinery.on_host
        copies = dict(zip(grads, pool.copy(list(grads.values())), strict=True))
        mark_now(self._machinery.devices[device]).block()
        self._book.add(layer, copies, task)

    def _weights(self, device: int, layer: int) -> WeightCopy:
        return self._machinery.weights[device].current(layer)

    # ---- optimizer

    def _norm(self, task: int) -> None:
        if self._program.rules.optimizer_on == "device":
            self._collect_all()
        most = self._machinery.clip_norm
        assert most is not None, "a plan that clips comes with a norm"
        norm = self._book.squared_norm() ** 0.5
        self._scale = torch.tensor(min(1.0, most / (norm + 1e-6)), dtype=torch.float64)

    def _collect_all(self) -> None:
        for device, weights in enumerate(self._machinery.weights):
            for layer in weights.held():
                self._book.add(layer, self._weights(device, layer).take_gradients())

    def _take_over(self, layer: int, weights: WeightCopy) -> None:
        """What the last visit to a layer leaves for its update, which runs beside further ops."""
        grads = weights.take_gradients()
        for each in grads.values():
            read_on_current_stream(each)
        self._book.add(layer, grads)
        self._machinery.transit.take(layer, weights)
        if self._poison and weights.flat is not None:
            weights.flat.fill_(255)

    def _update(self, task: int) -> None:
        layer, device = int(self._program.first[task]), int(self._program.source[task])
        machinery, rules = self._machinery, self._program.rules
        layers = machinery.layers
        sharing = machinery.sharing[layer]
        resident = rules.weights == "resident" and device >= 0
        held = machinery.weights[device].held() if resident else []
        here = [each for each in sharing if each in held]
        for each in here if self._scale is None else ():
            names = layers.owned_by(layer) if each == layer else layers.shared_by(each)
            self._book.add(each, self._weights(device, each).take_gradients(names))
        if task in self._updated:
            self._take_over(layer, self._updated.pop(task))
        scratch = machinery.scratch if rules.optimizer_on == "host" else None
        spent = self._book.assign(layer, self._scale, scratch)
        place = machinery.devices[device] if rules.optimizer_on == "device" else HOST
        try:
            with machinery.randomness.of_update(layer, self._step, place):
                machinery.masters.step(layer, self._settings)
        except Exception as error:
            error.add_note(f"in the optimizer's update of layer {layer}")
            raise
        self._spent(spent)
        if resident:
            for each in here:
                refresh_resident(layers, each, self._weights(device, each))
        elif rules.optimizer_on == "host":
            for each in sharing:
                if each in machinery.host_copies:
                    machinery.host_copies[each].refresh(self._step)


def _spend(pool: HostPool, gradients: Value, poisoned: bool) -> None:
    """Gradients are not needed any more; those that came down lie in the pool."""
    if poisoned:
        poison([each for each in tensors_of(gradients) if each.device == HOST])
    pool.give_back(gradients, CpuMark())
