"""Trainer: trains a model's layers by any policy."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..policies.lowering import lower
from ..policies.op import Op
from ..policies.plan import Place, Plan
from ..policies.planning import plan_of
from ..policies.policy import Policy, places_of_updates, policy_name
from ..policies.work import Work
from ..traces.errors import InputError
from ..traces.machine import Machine, ideal_machine
from ..traces.timeline import Lane
from ..traces.trace import Trace
from .checkpoint import load_checkpoint, save_checkpoint
from .compute import Computer, LossFunction, Randomness
from .engine import StepEngine
from .fitting import expected_memory, refuse_what_cannot_fit
from .lanes import LaneThread
from .layers import Layers, Replica
from .left_out import LeftOut
from .machinery import Machinery, lane_threads
from .masters import Masters, OptimizerFactory
from .measure import Measured, measure_layers, with_real_bytes
from .measure_machine import measure_machine
from .memory_cap import MemoryCap
from .older import put_older_weights
from .optimizer_bytes import OptimizerBytes, optimizer_bytes, rows_of
from .placement import place_weights
from .places import gpus_of, host_memory
from .program_tables import ProgramTables
from .run import Run
from .short_turns import short_turns
from .sizes import parse_bytes
from .step_result import StepResult
from .streams import Clock, IdleStreams, idle_streams
from .values import Value, batch_size, count_tokens, looks_of, map_tensors, moved, split_batch
from .weight_file import every_name
from .weights import resident_copy

REPEATS = 3
"""How often a layer is run to measure it, after once to warm up."""


@dataclass
class _Ready:
    """What is made before the first step."""

    work: Work
    machinery: Machinery
    threads: list[LaneThread]
    idle_streams: IdleStreams
    shapes: list[str] | None = None
    """Of the microbatches of the step before, if there was one."""


class NotANumber(ArithmeticError):
    """The loss of a step is not finite."""


class Trainer:
    """Trains layers by a policy, on devices that may be few and small.

    layers: the model's layers, a `Layers`, a list of modules or an nn.Sequential. The last one's
        output goes to `loss_fn(output, target)`, which returns a mean.
    policy: the policy object, unchanged from the simulator.
    optimizer: a torch optimizer class or a factory, called with the parameters.
    devices: names as torch has them; several times the same one makes virtual devices.
    microbatches: parts that a step's batch is cut into; each counts by its size.
    memory_limit: bytes, or text such as "24GiB", for each device. A plan that cannot fit a batch
        like the first is refused before that step; on CUDA the limit is also enforced.
    host_memory_limit: the same for the host, where it is not enforced. None: what
        `machine` says; where that is measured all there is but for 2 GiB and 4 %.
    trace: the layers' costs. None: they are measured at the first step, once.
    machine: links and rates that the policy plans with, in the order of `devices`. None: measured
        at the first step on GPUs; on the CPU transfers and updates are planned to take no time.
    compute_dtype: dtype of the weights on devices; masters keep the layers' own. None: the same.
    autocast: run the layers under torch.autocast with this dtype.
    parameter_groups: makes the optimizer's groups of {name: parameter}.
    clip_norm: clip gradients to this global norm; the policy must have `clip=True`.
    on_nan: `stop` raises NotANumber before the next step, `go on` trains on.
    seed: what dropout draws from, with step, layer and microbatch. None: torch.initial_seed().

    Usable as a context manager. Nothing starts before the first step.
    """

    def __init__(
        self,
        layers: Layers | Sequence[nn.Module],
        loss_fn: LossFunction,
        *,
        policy: Policy,
        optimizer: OptimizerFactory,
        devices: Sequence[str | torch.device],
        microbatches: int,
        memory_limit: int | str | None = None,
        host_memory_limit: int | str | None = None,
        trace: Trace | None = None,
        machine: Machine | None = None,
        compute_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        parameter_groups: Any = None,
        clip_norm: float | None = None,
        on_nan: Literal["stop", "go on"] = "stop",
        seed: int | None = None,
    ) -> None:
        if not devices:
            raise InputError("devices: name at least one")
        if microbatches < 1:
            raise InputError(f"microbatches: must be at least 1, got {microbatches}")
        if on_nan not in ("stop", "go on"):
            raise InputError(f"on_nan: must be 'stop' or 'go on', got {on_nan!r}")
        if clip_norm is not None and not getattr(policy, "clip", True):
            raise InputError("clip_norm: the policy must clip too; give it clip=True")
        self.layers = layers if isinstance(layers, Layers) else Layers(layers)
        self.policy = policy
        self.devices = [_numbered(torch.device(device)) for device in devices]
        if len(self.devices) > 1:
            self.layers.refuse_several_owners()
        self.microbatches = microbatches
        self.memory_limit = parse_bytes(memory_limit)
        self.host_memory_limit = parse_bytes(host_memory_limit, "host memory")
        self._cap = MemoryCap(self.devices, self.memory_limit)
        self.trace, self.machine = trace, machine
        self.step_number = 0
        self.masters = Masters(self.layers, optimizer, parameter_groups)
        self._loss_fn, self._optimizer_factory = loss_fn, optimizer
        self._compute_dtype, self._autocast = compute_dtype, autocast
        self._left_out: dict[int, LeftOut] = {}
        self._passes_gradient = self.layers.needs_gradient()
        self._clip_norm, self._on_nan = clip_norm, on_nan
        # torch's own optimizers draw no random numbers; others may, as to round by chance.
        draws = not type(self.optimizer).__module__.startswith("torch.optim.")
        self._randomness = Randomness(torch.initial_seed() if seed is None else seed, draws)
        self._training = any(module.training for module in self.layers.modules)
        self._ready: _Ready | None = None
        self._programs: dict[Plan, ProgramTables] = {}
        self._pending: list[tuple[Run, StepEngine]] = []
        self._closed = False
        self._older: dict[str, torch.Tensor] = {}
        self._microbatch = ""
        self._earlier: tuple[str, Trace | None] = "", None
        self._failure: BaseException | None = None
        self._poison = False
        self._around: Callable[[Callable[[int], None]], Callable[[int], None]] = lambda run: run

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, for schedulers; for a look at its state, `flush` first."""
        return self.masters.optimizer

    def step(self, inputs: Value, targets: Value) -> StepResult:
        """One step on a batch. Returns when the next may start.

        States that pass through devices, and weights with them, may be on their way down then, as
        may all updates of a stale step: `flush` waits for them, and `state_dict` and `save` do.

        Raises what a layer raised, with the layer and microbatch in its notes; InputError where the
        plan cannot run or cannot fit; NotANumber where the loss is not finite.
        """
        if self._closed:
            raise InputError("this trainer is closed; make a new one")
        size = batch_size(inputs)
        if size < self.microbatches:
            raise InputError(
                f"a batch of {size} cannot be cut into {self.microbatches} microbatches"
            )
        bounds = [size * number // self.microbatches for number in range(self.microbatches + 1)]
        parts = split_batch(inputs, bounds), split_batch(targets, bounds)
        shares = [(stop - first) / size for first, stop in pairwise(bounds)]
        cuda = {device.index for device in gpus_of(self.devices)}
        try:
            # Layers draw from seeds of their own; whoever draws beside them is not to notice.
            with short_turns(), torch.random.fork_rng(sorted(cuda)):
                largest = shares.index(max(shares))
                ready = self._prepare(parts[0][largest], parts[1][largest])
                tables = self._tables(ready.work)
                result = self._run(ready, tables, *parts, shares)
        except BaseException:
            self._abandon()
            raise
        self.step_number += 1
        self.masters.note_step()
        if not np.isfinite(result.loss) and self._on_nan == "stop":
            raise NotANumber(f"step {result.step}: the loss is {result.loss}")
        return result

    @torch.no_grad()
    def evaluate(self, inputs: Value, targets: Value) -> float:
        """The loss on a batch with the newest weights, in evaluation mode, layer by layer."""
        self.flush()
        device = self.devices[0]
        value, goal = moved(inputs, device), moved(targets, device)
        computer = Computer(device, self._loss_fn, Randomness(0), self._autocast, [])
        for layer, module in enumerate(self.layers.modules):
            weights = resident_copy(self.layers, layer, device, self._compute_dtype, own=False)
            replica = Replica(module, device)
            replica.bind(weights).eval()
            op = Op("F", layer, layer + 1, 0)
            value = computer.forward(op, 0, [replica.module], value, {layer})[layer]
        return float(computer.loss_of(value, goal))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and persistent buffers on the host, by the model's own names.

        A tied weight is one tensor under each of its names, as in a model's own.
        """
        self.flush()
        copies = {
            id(each): each.detach().cpu().clone() for _, each in self.layers.named_parameters()
        }
        state = {name: copies[id(each)] for name, each in every_name(self.layers).items()}
        return state | {name: each.cpu().clone() for name, each in self.layers.named_buffers()}

    def save(self, folder: str | Path, keep: int = 2) -> Path:
        """Write a checkpoint into `folder`, atomically, and keep the newest `keep` there.

        Raises InputError where it cannot be written.
        """
        return save_checkpoint(self, Path(folder), keep)

    def load(self, folder: str | Path) -> int:
        """Go on from the newest checkpoint in `folder`; returns the number of steps done.

        It may come from another policy or number of devices. Raises InputError, with nothing
        changed, where there is none, or a damaged one, or one of another model.
        """
        return load_checkpoint(self, Path(folder))

    def flush(self) -> None:
        """Wait until every update is done.

        Raises what went wrong in one, again whenever this is called: the weights are of no use.
        """
        if self._failure is not None:
            raise self._failure
        try:
            while self._pending:
                self._finish(*self._pending.pop(0))
        except BaseException as error:
            self._failure = error
            self._abandon()
            raise

    def close(self) -> None:
        """Wait for what runs, end all threads and let go of the devices' memory."""
        try:
            if not self._closed:
                self.flush()
        finally:
            self._end()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    # ---- before the first step

    def _prepare(self, inputs: Value, targets: Value) -> _Ready:
        if self._ready is None:
            places = places_of_updates([self.policy])
            kept = optimizer_bytes(
                self._optimizer_factory,
                self.layers.dtype(),
                self._compute_dtype,
                self.devices[0] if "device" in places else "cpu",
                map(rows_of, self.layers.trained()),
            )
            self._microbatch = looks_of((inputs, targets))
            measured_for, earlier = self._earlier
            if self.trace is None and measured_for == self._microbatch:
                self.trace = earlier
            if self.trace is None or self._training:
                measured = self._measure(inputs, targets, kept)
                self._randomness.draws = measured.draws
                self._left_out = measured.left_out
                self._passes_gradient = measured.passes_gradient
                self.trace = self.trace or measured.trace
            if len(self.trace.layers) != len(self.layers):
                raise InputError(
                    f"trace: has {len(self.trace.layers)} layers, the model {len(self.layers)}"
                )
            self.trace = with_real_bytes(self.trace, self.layers, self._compute_dtype, kept)
            machine = self._machine_here(places)
            work = Work(self.trace, machine, self.microbatches)
            plan = plan_of(self.policy, work, self.step_number)
            if plan.clip != (self._clip_norm is not None):
                raise InputError(
                    "clip_norm: give it if and only if the policy clips (clip=True); "
                    f"it is {self._clip_norm}, the plan's clip is {plan.clip}"
                )
            refuse_what_cannot_fit(self.policy, plan, work, self.step_number)
            self._cap.set()
            lanes = lane_threads(self.devices)
            threads = list(lanes.values())
            try:
                machinery = self._machinery(plan, lanes)
                put_older_weights(self.layers, machinery.host_copies, self._older, self.step_number)
                self.masters.settle()
            except BaseException:
                for thread in threads:
                    thread.close()
                raise
            self._older = {}
            self._ready = _Ready(work, machinery, threads, idle_streams(self.devices))
        return self._ready

    def _measure(self, inputs: Value, targets: Value, optimizer: OptimizerBytes) -> Measured:
        """Of the layers; where a trace is given, its costs are those that count."""
        return measure_layers(
            self.layers,
            self._loss_fn,
            inputs,
            targets,
            self.devices[0],
            compute=self._compute_dtype,
            autocast=self._autocast,
            optimizer=optimizer,
            repeats=REPEATS if self.trace is None else 1,
        )

    def _machine_here(self, updates_on: Collection[Place]) -> Machine:
        on_gpus = any(device.type == "cuda" for device in self.devices)
        if self.machine is None and on_gpus:
            self.machine = measure_machine(
                self.devices,
                [0] * len(self.devices),
                self._optimizer_factory,
                self._compute_dtype,
                weights=self.layers.dtype(),
                updates_on=updates_on,
                host_memory_bytes=host_memory(),
            )
        machine = self.machine or ideal_machine(len(self.devices))
        machine = machine.first_devices(len(self.devices))
        return machine.with_memory(self.memory_limit, self.host_memory_limit)

    def _machinery(self, plan: Plan, lanes: Mapping[Lane, LaneThread]) -> Machinery:
        needs = self._passes_gradient
        computers = [
            Computer(device, self._loss_fn, self._randomness, self._autocast, needs, self._left_out)
            for device in self.devices
        ]
        placed = place_weights(plan, self.layers, self.devices, self._compute_dtype)
        self.masters.bind()
        return Machinery(
            self.layers,
            self.devices,
            computers,
            self.masters,
            placed,
            self._clip_norm,
            lanes,
            self._randomness,
        )

    # ---- a step

    def _tables(self, work: Work) -> ProgramTables:
        plan = plan_of(self.policy, work, self.step_number)
        if plan not in self._programs:
            if self._programs:
                lower([next(iter(self._programs)), plan], work)  # Refuses what steps cannot change.
            self._programs[plan] = ProgramTables(lower([plan], work))
        return self._programs[plan]

    def _run(
        self,
        ready: _Ready,
        tables: ProgramTables,
        inputs: list[Value],
        targets: list[Value],
        shares: list[float],
    ) -> StepResult:
        # Updates that draw random numbers are waited for: the user may draw after the step.
        stale = tables.program.rules.optimizer == "stale" and not self._randomness.updates_draw
        # States that were updated on a device may go down while the next step begins.
        lags = bool(tables.states_down) and not stale
        while len(self._pending) > (1 if stale or lags else 0):
            self._finish(*self._pending.pop(0))
        overlaps = stale and not self._randomness.draws
        if overlaps:
            # The devices may still read them when the user has taken them back.
            inputs, targets = ([_own(each) for each in parts] for parts in (inputs, targets))
        ready.machinery.on_host.tidy()
        engine = StepEngine(
            tables, ready.machinery, self.step_number, inputs, targets, shares, self._poison
        )
        after = self._after(tables) if overlaps or lags else None
        shapes = [looks_of(each) for each in inputs]
        # What comes down in other shapes gets places on the host.
        before = tables.before if shapes == ready.shapes else tables.first_before
        run = Run(tables.program, before, after)
        clock = Clock(ready.idle_streams)
        handler = self._around(engine.run)
        # Before any lane begins: whoever is interrupted in here has to stop it.
        self._pending.append((run, engine))
        for lane, thread in enumerate(ready.threads):
            thread.submit(run, lane, handler)
        until = tables.loss_tasks if overlaps else tables.ends if lags else None
        self._wait(run, ready, stale or lags, until, engine)
        loss = sum(engine.losses[number] for number in range(self.microbatches))
        tokens = sum(map(count_tokens, inputs))
        if tables.states_down and ready.shapes is None:
            # States get their places on the host, too: beside a next step they would take its room.
            self.flush()
        ready.shapes = shapes
        name = policy_name(self.policy)
        return StepResult(self.step_number, loss, run, clock, name, tokens, overlaps)

    def _after(self, tables: ProgramTables) -> dict[int, list[tuple[Run, int]]]:
        """What the next run's tasks wait for of the one that is still under way."""
        if not self._pending:
            return {}
        (earlier, engine) = self._pending[-1]
        after = tables.after(engine.tables)
        return {task: [(earlier, each) for each in waits] for task, waits in after.items()}

    def _wait(
        self,
        run: Run,
        ready: _Ready,
        lags: bool,
        until: Sequence[int] | None,
        engine: StepEngine,
    ) -> None:
        """Wait for a step: for these tasks, where the next may begin behind them.

        Else for all of it, or where it `lags` for the devices. What went wrong in the step before,
        that was still under way, is raised first.
        """
        lanes = enumerate(run.program.lanes)
        numbers = [number for number, lane in lanes if not (lags and lane.device < 0)]
        try:
            for task in engine.tables.loss_tasks:
                # Now: in the end they would be copied behind all states on their way down.
                run.wait_for([task])
                if run.failure is None:
                    engine.fetch_loss(task)
            if until is None:
                run.wait(numbers)
            else:
                run.wait_for(until)
        except BaseException as error:
            run.fail(error)
            run.wait()
            raise
        for earlier, _ in self._pending[:-1]:
            if earlier.failure is not None:
                run.fail(earlier.failure)
        if run.failure is not None:
            run.wait()
            if isinstance(run.failure, torch.OutOfMemoryError):
                note = expected_memory(run.program, self.memory_limit, self.step_number)
                run.failure.add_note(note)
            raise run.failure
        if not lags:
            self.flush()

    def _finish(self, run: Run, engine: StepEngine) -> None:
        run.wait()
        engine.close()
        if run.failure is not None:
            raise run.failure

    def _abandon(self) -> None:
        """Stop what runs, whatever state it leaves."""
        for run, engine in self._pending:
            run.fail(RuntimeError("the trainer was abandoned"))
            run.wait()
            engine.close()
        self._pending.clear()
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._release()

    def _release(self) -> None:
        """End all threads and bring everything back to the host; a next step starts anew."""
        ready, self._ready = self._ready, None
        for thread in ready.threads if ready else ():
            thread.close()
        for gpu in gpus_of(self.devices) if ready else ():
            # What failed may have left copies under way, to and from memory that goes now.
            torch.cuda.synchronize(gpu)
        for weights in ready.machinery.weights if ready else ():
            weights.clear()
        self._programs.clear()
        self.masters.to_host()
        self._cap.lift()
        if any(device.type == "cuda" for device in self.devices):
            torch.cuda.empty_cache()


def _own(value: Value) -> Value:
    """A copy that nobody else changes."""
    return map_tensors(torch.Tensor.clone, value)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: `cuda` is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
