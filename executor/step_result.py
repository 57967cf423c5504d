"""StepResult: what one step came to."""

from typing import NamedTuple

import numpy as np

from ..policies.record import record
from ..traces.timeline import COMPUTE_KINDS, KINDS, Timeline
from .run import Run
from .streams import Clock

LATE_NS = 100_000
"""An op that was launched no sooner than so long before its end: its device waited for the host."""


class Launch(NamedTuple):
    """How long the host took to launch an op, and how long before the op's end that was done."""

    lane: str
    kind: str
    host_ns: int
    lead_ns: int

    @property
    def late(self) -> bool:
        """Whether its device waited for the host."""
        return self.lead_ns < LATE_NS


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
            starts, ends = self._run.times_ns(self._clock)
            first = min(starts, default=0) if self._overlaps else 0
            times = np.array(starts, np.int64) - first, np.array(ends, np.int64) - first
            self._timeline = record(self._run.program, *times, self._name, "measured")
        return self._timeline

    @property
    def launches(self) -> list[Launch]:
        """How the host kept up with each op, lane by lane. Waits for the step's last update.

        On the CPU ops run as they are launched, and every one is late.
        """
        run, start_ns = self._run, self._clock.start_ns
        self._run.wait()
        result = []
        for number, lane in enumerate(run.program.lanes):
            for task in run.program.tasks_of(number):
                kind, ended = KINDS[run.program.kind[task]], run.ended[task]
                if kind in COMPUTE_KINDS and ended is not None:
                    lead_ns = ended.time_ns(self._clock) - (run.issued_ns[task] - start_ns)
                    host_ns = run.issued_ns[task] - run.begun_ns[task]
                    result.append(Launch(lane.name, kind, host_ns, lead_ns))
        return result

    @property
    def tokens_per_s(self) -> float:
        """Tokens (samples, where the trace counts those) a second in this step."""
        return self._tokens / (self.timeline.makespan_ns / 1e9)
