"""What a training is made of, from names and numbers: optimizer, dtypes, measured work."""

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..policies.plan import Place
from ..policies.work import Work
from ..traces.errors import InputError
from .masters import OptimizerFactory
from .measure import Told, measure_layers
from .measure_machine import THOROUGHLY_S, measure_machine
from .model_source import Model
from .optimizer_bytes import optimizer_bytes, rows_of
from .training_loop import Batches
from .values import batch_size, split_batch

Groups = Callable[[Mapping[str, nn.Parameter]], list[dict[str, Any]]]


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype called `name`."""
    return None if name is None else getattr(torch, name)


def optimizer_factory(name: str, lr: float, options: Mapping[str, Any]) -> OptimizerFactory:
    """The class of torch.optim called `name`, or `module.Class` of a package, with its options.

    Fused kernels are used where it has them and nothing else is asked for. Raises InputError.
    """
    kind = getattr(torch.optim, name, None) if "." not in name else _class_of_package(name)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        names = [key for key, value in vars(torch.optim).items() if isinstance(value, type)]
        known = ", ".join(sorted(set(names) - {"Optimizer", "LBFGS"}))
        raise InputError(
            f"optimizer: torch.optim has no {name!r}; it has {known}; "
            "write a package's own as module.Class"
        )
    if name == "LBFGS":
        raise InputError("optimizer: LBFGS needs all parameters at once; use another")
    accepted = signature(kind).parameters
    chosen = {"lr": lr, **options}
    if "fused" in accepted and not {"fused", "foreach"} & set(options):
        chosen["fused"] = True
    for option in chosen:
        if option not in accepted:
            raise InputError(f"optimizer: {name} has no option {option!r}")

    def make(parameters: Any) -> torch.optim.Optimizer:
        try:
            return kind(parameters, **chosen)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"optimizer: {name}: {error}") from error

    return make


def _class_of_package(name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    try:
        return getattr(import_module(module), leaf, None)
    except (ImportError, ValueError) as error:
        raise InputError(f"optimizer: {name}: cannot import {module}: {error}") from error


def decay_groups(weight_decay: float) -> Groups:
    """Parameter groups of which only matrices decay, not norms and biases."""

    def groups(named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        matrices = [each for each in named.values() if each.ndim >= 2]
        others = [each for each in named.values() if each.ndim < 2]
        made = [(matrices, weight_decay), (others, 0.0)]
        return [{"params": each, "weight_decay": decay} for each, decay in made if each]

    return groups


def measured_work(
    model: Model,
    batches: Batches,
    devices: Sequence[torch.device],
    microbatches: int,
    memory_bytes: Sequence[int],
    optimizer: OptimizerFactory,
    *,
    compute: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    updates_on: Collection[Place] = ("host", "device"),
    host_memory_bytes: int = 0,
    name: str = "layers",
    told: Told = lambda layer, count, name: None,
    repeats: int = 1,
    split: bool = False,
    warm_s: float = 0.0,
) -> Work:
    """The work of a step on these devices: what layers and machine cost, measured now."""
    weights = model.layers.dtype()
    place = devices[0] if "device" in updates_on else "cpu"
    matrices = map(rows_of, model.layers.trained())
    inputs, targets = batches.batch(0)
    rows = -(-batch_size(inputs) // microbatches)  # Those of the largest microbatch.
    part, goal = (split_batch(value, [0, rows])[0] for value in (inputs, targets))
    trace, *_ = measure_layers(
        model.layers,
        model.loss_fn,
        part,
        goal,
        devices[0],
        compute=compute,
        autocast=autocast,
        optimizer=optimizer_bytes(optimizer, weights, compute, place, matrices),
        repeats=repeats,
        split=split,
        warm_s=warm_s,
        told=told,
    )
    named = trace.model_copy(update={"name": name})
    machine = measure_machine(
        devices,
        memory_bytes,
        optimizer,
        compute,
        weights=weights,
        updates_on=updates_on,
        host_memory_bytes=host_memory_bytes,
        timed_s=THOROUGHLY_S,
    )
    return Work(named, machine, microbatches)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate, whatever a checkpoint said, for a scheduler to begin."""
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def explain(error: BaseException) -> str:
    """What went wrong in a step, where, and what to do about it, in one line."""
    notes = [" ".join(note.split()) for note in getattr(error, "__notes__", [])]
    message = " ".join(str(error).split())
    if is_out_of_memory(error):
        head, _, _ = message.partition(". GPU")
        advice = [] if any("expected" in note for note in notes) else [_ADVICE]
        return "; ".join([f"out of memory: {head}", *notes, *advice])
    kind = type(error).__name__
    return ": ".join([*(note.removeprefix("in ") for note in notes), kind, message]).rstrip(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, a device's or the host's, ran out."""
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


_ADVICE = "use more microbatches, recompute, or streamed weights (round-robin)"
