"""Predict a policy's step, run it, and say how far off the prediction was."""

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .analysis.metrics import measure
from .api import STEADY_STEPS, Simulation, simulate_work
from .policies.lowering import lower
from .policies.plan import Plan
from .policies.policy import Policy
from .policies.work import Work
from .sim.engine import simulate_program
from .traces.remeasured import machine_of_timeline, trace_of_timeline
from .traces.timeline import Timeline

if TYPE_CHECKING:
    from .executor.step_result import Launch
    from .train_job import Job

WARM_UP = 2
"""Steps before those that count: memory is taken and caches fill."""


@dataclass(frozen=True)
class Measured:
    """Steps that were run.

    timeline: of the step of median length, whose number is `step`. steps_s: how long each took.
    memory_bytes: the peak on the fullest device as its allocator counts it, None on the CPU.
    retries: how often an allocator had to give all that it kept back, which stops a GPU.
    late: by compute lane, of how many ops the device waited for the host, and of how many in all.
    """

    timeline: Timeline
    step: int
    steps_s: tuple[float, ...]
    memory_bytes: int | None
    retries: int
    late: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Validation:
    """One policy, predicted and measured.

    predicted: a step among others. alone: the very step that `run.timeline` has, predicted as if
    there were no other. resimulated: a step among others, from the times that the run's own ops
    and updates took, so that what is left is the cost model's. places: the devices.
    """

    name: str
    predicted: Simulation
    alone: Timeline
    resimulated: Simulation
    run: Measured
    places: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """The measured step time."""
        return statistics.median(self.run.steps_s)

    @property
    def expected_bytes(self) -> int:
        """The peak that is predicted for the fullest GPU, all its virtual devices together."""
        peaks: dict[str, int] = {}
        together = zip(self.places, self.predicted.metrics.peak_memory_bytes, strict=True)
        for place, peak in together:
            peaks[place] = peaks.get(place, 0) + peak
        return max(peaks.values())

    def to_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        return {
            "policy": self.name,
            "predicted_alone": measure(self.alone).to_json(self.name),
            "resimulated": self.resimulated.metrics.to_json(self.name),
            "measured": measure(self.run.timeline).to_json(self.name),
            "step_s": {
                "predicted": self.predicted.metrics.step_s,
                "resimulated": self.resimulated.metrics.step_s,
                "measured": self.step_s,
                "steps": self.run.steps_s,
                "error": error(self.predicted.metrics.step_s, self.step_s),
            },
            "peak_memory_bytes": {
                "predicted": self.expected_bytes,
                "measured": self.run.memory_bytes,
            },
            "allocator_retries": self.run.retries,
            "ops_late": self.run.late,
            "differences": [vars(each) for each in differences(self.alone, self.run.timeline)],
        }


def error(predicted: float, measured: float) -> float:
    """How much too long, as a share of what was measured."""
    return predicted / measured - 1


def validate(job: "Job", work: Work, name: str, policy: Policy, steps: int) -> Validation:
    """Predict from `work`, then train `steps` steps for real. Raises what the trainer raises."""
    predicted = predict(work, policy, name)
    done = run(job, work, policy, steps)
    alone = simulate_program(lower([policy.plan(work, done.step)], work), name)
    trace = trace_of_timeline(done.timeline, work.trace)
    machine = machine_of_timeline(done.timeline, alone, work.machine)
    again = Work(trace, machine, work.microbatches)
    resimulated = predict(again, _Same(policy, work), name)
    places = tuple(map(str, job.devices))
    return Validation(name, predicted, alone, resimulated, done, places)


def predict(work: Work, policy: Policy, name: str) -> Simulation:
    """What a step is to take: the first one, or where each goes on beside the next a later one."""
    outlasts = policy.plan(work, 0).outlasts_step
    return simulate_work(work, policy, STEADY_STEPS if outlasts else 1, name)


@dataclass(frozen=True)
class _Same:
    """Plans whatever it is asked to as if it were `work`: the plan that ran."""

    policy: Policy
    work: Work

    def plan(self, work: Work, step: int) -> Plan:
        return self.policy.plan(self.work, step)


def run(job: "Job", work: Work, policy: Policy, steps: int) -> Measured:
    """Train so many steps, after some to warm up."""
    from .executor.places import allocator_retries, count_peaks_anew, peak_memory

    with job.trainer(policy, work) as trainer:
        times: list[float] = []
        results = []
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                count_peaks_anew(job.devices)
                retries = allocator_retries(job.devices)
            batch = job.batches.batch(number)
            start = time.perf_counter()
            results.append(trainer.step(*batch))
            times.append(time.perf_counter() - start)
        middle = sorted(range(WARM_UP, len(times)), key=times.__getitem__)[steps // 2]
        return Measured(
            results[middle].timeline,
            results[middle].step,
            tuple(times[WARM_UP:]),
            peak_memory(job.devices),
            allocator_retries(job.devices) - retries,
            _late(results[middle].launches),
        )


def _late(launches: list["Launch"]) -> dict[str, tuple[int, int]]:
    late: dict[str, list[bool]] = {}
    for each in launches:
        late.setdefault(each.lane, []).append(each.late)
    return {lane: (sum(mine), len(mine)) for lane, mine in late.items()}


@dataclass(frozen=True)
class Difference:
    """What a lane did of one kind: predicted and measured seconds, and when the last one ended."""

    lane: str
    kind: str
    predicted_s: float
    measured_s: float
    predicted_end_s: float
    measured_end_s: float


def differences(predicted: Timeline, measured: Timeline, most: int = 3) -> list[Difference]:
    """Where the two differ most in time at work, by lane and kind of task, largest first."""
    sums = [_by_lane_and_kind(each) for each in (predicted, measured)]
    found = []
    for key in sorted(sums[0].keys() | sums[1].keys()):
        (before, before_end), (after, after_end) = (each.get(key, (0.0, 0.0)) for each in sums)
        found.append(Difference(*key, before, after, before_end, after_end))
    return sorted(found, key=lambda each: -abs(each.measured_s - each.predicted_s))[:most]


def _by_lane_and_kind(timeline: Timeline) -> dict[tuple[str, str], tuple[float, float]]:
    """(seconds at work, last end) of each lane and kind, a step's worth."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for span in timeline.spans():
        if span.step:
            continue
        key = span.lane.name, span.kind
        total, end = sums.get(key, (0.0, 0.0))
        length = (span.end_ns - span.start_ns) / 1e9
        sums[key] = total + length, max(end, span.end_ns / 1e9)
    return sums
