"""StepResult: what one step came to."""

import numpy as np

from ..policies.record import record
from ..traces.timeline import Timeline
from .run import Run
from .streams import Clock


class StepResult:
    """What one step came to."""

    def __init__(
        self,
        step: int,
        loss: float,
        run: Run,
        clock: Clock,
        name: str,
        tokens: int,
        overlaps: bool = False,
    ) -> None:
        self.step = step
        self.loss = loss
        self._overlaps = overlaps
        self._run, self._clock, self._name, self._tokens = run, clock, name, tokens
        self._timeline: Timeline | None = None

    @property
    def timeline(self) -> Timeline:
        """What ran when, as it was measured. Waits for the step's last update.

        Of a step that overlaps others it begins with the first task: before that the devices were
        at the step before.
        """
        if self._timeline is None:
            self._run.wait()
            if self._run.failure is not None:
                raise self._run.failure
            ends = [mark.time_ns(self._clock) for mark in self._run.ended if mark is not None]
            starts = [mark.time_ns(self._clock) for mark in self._run.started if mark is not None]
            first = min(starts, default=0) if self._overlaps else 0
            times = np.array(starts, np.int64) - first, np.array(ends, np.int64) - first
            self._timeline = record(self._run.program, *times, self._name, "measured")
        return self._timeline

    @property
    def tokens_per_s(self) -> float:
        """Tokens (samples, where the trace counts those) a second in this step."""
        return self._tokens / (self.timeline.makespan_ns / 1e9)
