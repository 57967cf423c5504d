"""The loop around a trainer: steps, held-out loss, learning rate, checkpoints."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .values import Value, count_tokens

if TYPE_CHECKING:
    from .step_result import StepResult
    from .trainer import Trainer

Schedule = Literal["constant", "linear", "cosine"]


class Batches(Protocol):
    """Where batches come from, as (inputs, targets)."""

    def batch(self, step: int) -> tuple[Value, Value]:
        """The batch of step number `step`, counted from 0: always the same one."""
        ...

    def held_out(self, count: int, size: int) -> Iterable[tuple[Value, Value]]:
        """At most `count` batches of `size` samples that are never trained on."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    steps: in all, those of an earlier run that is gone on with included.
    schedule, warmup: the learning rate rises over `warmup` steps, then stays, or falls to
        `final_share` of it, which a step behind the last would have, as in Hugging Face's.
    evaluate_every: in steps, and after the last; 0 is never.
    save_every: in steps; 0 is only at the end. `folder` None: never.
    evaluate_batches: held-out batches at most, each of `evaluate_size` samples.
    """

    steps: int
    schedule: Schedule = "constant"
    warmup: int = 0
    final_share: float = 0.0
    evaluate_every: int = 0
    evaluate_batches: int = 8
    evaluate_size: int = 1
    save_every: int = 0
    folder: Path | None = None
    keep: int = 2


@dataclass(frozen=True)
class StepReport:
    """A step that is done. `step` counts from 1, as checkpoints do.

    held_out_loss: after the step, where it was asked for.
    """

    step: int
    loss: float
    lr: float
    tokens_per_s: float
    result: "StepResult"
    held_out_loss: float | None = None


class Watcher(Protocol):
    """What the loop tells as it goes."""

    def started(self, step: int, held_out_loss: float | None) -> None:
        """Training begins behind so many steps."""
        ...

    def stepped(self, report: StepReport) -> None:
        """A step is done."""
        ...

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is whole."""
        ...

    def should_stop(self) -> bool:
        """Asked before every step; True ends training there, with a checkpoint."""
        ...


def run_loop(
    trainer: "Trainer", batches: Batches, settings: LoopSettings, watcher: Watcher
) -> None:
    """Train from the trainer's step on to the last. Raises what `Trainer.step` raises."""
    scheduler = make_scheduler(trainer, settings)
    first, last = trainer.step_number, settings.steps
    begins = held_out_loss(trainer, batches, settings) if settings.evaluate_every else None
    watcher.started(first, begins)
    saved = first
    while trainer.step_number < last and not watcher.should_stop():
        report = _one_step(trainer, batches, scheduler)
        if _due(report.step, settings.evaluate_every, last):
            loss = held_out_loss(trainer, batches, settings)
            report = replace(report, held_out_loss=loss)
        watcher.stepped(report)
        if settings.save_every and report.step % settings.save_every == 0:
            saved = _save(trainer, settings, watcher)
    if settings.folder and saved < trainer.step_number:
        _save(trainer, settings, watcher)


def held_out_loss(trainer: "Trainer", batches: Batches, settings: LoopSettings) -> float:
    """The mean loss of the held-out batches; NaN where there are none."""
    pairs = batches.held_out(settings.evaluate_batches, settings.evaluate_size)
    losses = [trainer.evaluate(*pair) for pair in pairs]
    return sum(losses) / len(losses) if losses else math.nan


def make_scheduler(trainer: "Trainer", settings: LoopSettings) -> Any:
    """The scheduler of the learning rate, where the trainer's step has it; None for a flat one.

    The rate at a step depends on the step alone, so a scheduler has no state to be saved.
    """
    if settings.schedule == "constant" and not settings.warmup:
        return None
    for group in trainer.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer,
        lambda step: lr_share(step, settings),
        last_epoch=trainer.step_number - 1,
    )


def lr_share(step: int, settings: LoopSettings) -> float:
    """The share of the full learning rate that step number `step`, counted from 0, trains with."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    done = min(1.0, done)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final_share + (1 - settings.final_share) * left


def _one_step(trainer: "Trainer", batches: Batches, scheduler: Any) -> StepReport:
    start = time.perf_counter()
    inputs, targets = batches.batch(trainer.step_number)
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    result = trainer.step(inputs, targets)
    if scheduler is not None:
        scheduler.step()
    rate = count_tokens(inputs) / (time.perf_counter() - start)
    return StepReport(trainer.step_number, result.loss, lr, rate, result)


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _save(trainer: "Trainer", settings: LoopSettings, watcher: Watcher) -> int:
    from .checkpoint import save_checkpoint

    if settings.folder is not None:
        path = save_checkpoint(trainer, settings.folder, keep=settings.keep)
        watcher.saved(trainer.step_number, path)
    return trainer.step_number
