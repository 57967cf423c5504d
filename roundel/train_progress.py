"""What `roundel train` shows while it runs, and how Ctrl-C ends it."""

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .analysis.units import human_rate
from .console import say
from .train_log import TrainLog

if TYPE_CHECKING:
    from .executor.step_result import StepResult
    from .executor.training_loop import StepReport

LINES = 20
"""About how many lines a training prints where there is no terminal."""

RECENT = 20
"""Steps from which the time left is told."""


class Stopper:
    """Whether someone asked to stop: the first Ctrl-C asks, the second interrupts."""

    def __init__(self, console: Console) -> None:
        self.signal = 0
        self._console = console

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        say(self._console, "stopping after this step; once more to stop at once")


@contextmanager
def stopping(console: Console) -> Iterator[Stopper]:
    """Ctrl-C and SIGTERM ask for a stop, in the main thread."""
    stopper = Stopper(console)
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stopper) for number in numbers}
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Display:
    """A Watcher that shows a bar on a terminal and prints lines elsewhere, and writes the log.

    `result` is that of the step that is to be drawn: `wanted`, or the last one so far.
    """

    def __init__(
        self, console: Console, steps: int, log: TrainLog, stopper: Stopper, wanted: int | None
    ) -> None:
        self.result: StepResult | None = None
        self.drawn = 0
        self.done = 0
        self.tokens_per_s: deque[float] = deque(maxlen=RECENT)
        self.held_out: list[tuple[int, float]] = []
        self._console, self._steps, self._log = console, steps, log
        self._stopper, self._wanted = stopper, wanted
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[said]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, said="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def started(self, step: int, held_out_loss: float | None) -> None:
        """Training begins behind so many steps."""
        self.done = step
        self._ends.append(time.perf_counter())
        self._bar.update(self._task, completed=step)
        if held_out_loss is not None:
            self.held_out.append((step, held_out_loss))
            say(self._console, f"step {step} of {self._steps}: held-out loss {held_out_loss:.4f}")

    def stepped(self, report: "StepReport") -> None:
        """A step is done."""
        self.done = report.step
        self._log.write(report)
        self._ends.append(time.perf_counter())
        self.tokens_per_s.append(report.tokens_per_s)
        if self._wanted is None or report.step == self._wanted:
            self.result, self.drawn = report.result, report.step
        if report.held_out_loss is not None:
            self.held_out.append((report.step, report.held_out_loss))
        self._bar.update(self._task, completed=report.step, said=self._said(report))
        if report.held_out_loss is not None or self._is_due(report.step):
            say(self._console, f"step {report.step} of {self._steps}: {self._said(report)}")

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is whole."""
        say(self._console, f"saved {path}")

    def should_stop(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._stopper.signal != 0

    def _is_due(self, step: int) -> bool:
        """Whether a step's line is printed where there is no bar to see."""
        due = step % -(-self._steps // LINES) == 0 or self._is_last
        return due and not self._console.is_terminal

    @property
    def _is_last(self) -> bool:
        return self.done == self._steps

    def _said(self, report: "StepReport") -> str:
        parts = [f"loss {report.loss:.4f}"]
        # Lines have it where it is new; the bar keeps it in sight.
        if self.held_out and (self._console.is_terminal or report.held_out_loss is not None):
            parts.append(f"held-out {self.held_out[-1][1]:.4f}")
        parts.append(f"{human_rate(report.tokens_per_s)} tokens/s")
        if not self._is_last:
            parts.append(f"{_clock(self._seconds_left())} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float:
        each = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        return each * (self._steps - self.done)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
