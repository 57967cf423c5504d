"""One training from its settings to its last checkpoint."""

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .analysis.chrome import write_chrome_trace
from .analysis.files import CHROME_TRACES, PICTURES, output_path, try_to_write, writing
from .analysis.units import human_rate
from .console import busy, say
from .traces.errors import CannotFit, InputError
from .train_job import Job
from .train_log import TrainLog
from .train_progress import Display, stopping
from .train_settings import AUTO, LogSection, TrainConfig

if TYPE_CHECKING:
    from .executor.trainer import Trainer


def run_training(config: TrainConfig, debug: bool = False) -> int:
    """Train; returns the exit code. Raises InputError for what is wrong before the first step."""
    _check_outputs(config.log, config.checkpoint.folder)
    console = Console()
    with busy("loading", console):
        from .executor.places import sharing_cores

        # What does not fit is to be known before there are weights.
        job = Job.of(config, empty=config.policy.name == AUTO)
    with sharing_cores(job.devices):
        job, policy, work = job.settled(console)
        with busy("loading", console):
            job = job.loaded()
        with job.trainer(policy, work) as trainer:
            first = job.resumed(trainer, console)
            say(console, job.summary(policy))
            return _train(job, trainer, first, console, debug)


def _train(job: Job, trainer: "Trainer", first: int, console: Console, debug: bool) -> int:
    from .executor.training_loop import run_loop

    log, settings = job.config.log, job.loop()
    path = Path(log.file) if log.file else None
    with (
        TrainLog(path, first) as lines,
        stopping(console) as stopper,
        Display(console, settings.steps, lines, stopper, log.timeline_step) as display,
    ):
        try:
            run_loop(trainer, job.batches, settings, display)
        except CannotFit as error:
            if job.config.policy.name == AUTO:
                raise
            raise InputError(f"{error}; or let --policy auto simulate what fits") from None
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            return _failed(trainer, error, debug)
    _draw(display, job, console)
    say(console, _farewell(display, job))
    return 128 + stopper.signal if stopper.signal else 0


def _check_outputs(log: LogSection, checkpoints: str | None) -> None:
    """What cannot be written is to be known before training. Makes the folders."""
    if checkpoints:
        folder = Path(checkpoints)
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with writing(folder, "folder of checkpoints"):
            try_to_write(there)
    for path, what, suffixes in (
        (log.file, "log", ()),
        (log.timeline, "picture", PICTURES),
        (log.perfetto, "Chrome trace", CHROME_TRACES),
    ):
        if path:
            with writing(Path(path), what):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                try_to_write(Path(path).parent)
            output_path(path, what, suffixes)


def _failed(trainer: "Trainer", error: Exception, debug: bool) -> int:
    from .executor.trainer import NotANumber
    from .executor.training_setup import explain

    if debug:
        traceback.print_exception(error)
    step = trainer.step_number + (0 if isinstance(error, NotANumber) else 1)
    what = str(error).partition(": ")[2] if isinstance(error, NotANumber) else explain(error)
    print(f"roundel: step {step}: {what}", file=sys.stderr)
    return 1


def _draw(display: Display, job: Job, console: Console) -> None:
    log = job.config.log
    if display.result is None or not (log.timeline or log.perfetto):
        return
    with busy("drawing", console):
        timeline = display.result.timeline
        if log.timeline:
            from .analysis.timeline_picture import draw_timeline

            title = f"{timeline.name}: {job.config.model.name}, step {display.drawn}, measured"
            draw_timeline(timeline, log.timeline, title)
        if log.perfetto:
            write_chrome_trace(timeline, log.perfetto)
    for path in filter(None, (log.timeline, log.perfetto)):
        say(console, f"step {display.drawn}: {path}")


def _farewell(display: Display, job: Job) -> str:
    """What came of it, in a line."""
    steps = job.config.train.steps
    if not display.tokens_per_s:
        return f"all {steps} steps are done already"
    said = [f"{display.done} of {steps} steps done"]
    if display.held_out:
        (_, first), (_, last) = display.held_out[0], display.held_out[-1]
        said.append(f"held-out loss {first:.4f} -> {last:.4f}")
    rate = sum(display.tokens_per_s) / len(display.tokens_per_s)
    said.append(f"{human_rate(rate)} tokens/s")
    if display.done < steps and job.folder:
        said.append("go on with --resume")
    return ", ".join(said)
