"""Where a step's time goes, on the host and on the GPUs: measured, beside what was simulated.

    python benchmarks/step_profile.py --out FOLDER --devices cuda:0,cuda:1
        --systems "round-robin,layer-to-layer" [--model qwen3-1.7b] [--steps 5]

For each policy (by `training.py`'s names): the steps' times and the simulated one; what the
allocator asked of the driver in them; how long each kind of op took, against the profile, how long
the host took to launch one, and of how many the GPU waited for the host; and of one step more,
under torch.profiler, how long the compute streams stood still between two kernels, and whether the
host was late with the next one or it waited for others. Where the host was late it says after
which call. Prints tables; writes JSON, and the profiler's own export.
"""

import argparse
import gzip
import json
import os
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from about import about
from torch import Tensor
from training import POLICIES, names_of, parser_of, slug_of, trainer_of, wait_for
from training_common import WARM_UP, batches, devices_of, timed

import roundel
from roundel.executor.places import gpus_of
from roundel.executor.step_result import Launch
from roundel.policies.lowering import lower
from roundel.sim.engine import simulate_program
from roundel.traces.timeline import KINDS, Timeline

GAP_US = 100
"""A stream that stands still for less is not looked at."""

ASKED = ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_sync_all_streams")
"""What the allocator counts of what it asks of the driver."""


def steps_of(trainer: roundel.Trainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of the steps after those to warm up, and what the allocator asked meanwhile."""
    results, asked_by_then = [], []

    def step(inputs: Tensor, targets: Tensor) -> float:
        results[:] = [trainer.step(inputs, targets)]
        return float(results[0].loss)

    def wait() -> None:
        wait_for(trainer)
        asked_by_then.append(asked(arguments))

    times = timed(step, arguments, wait)["step_s"]
    (before, after), simulated = asked_by_then, simulated_step(trainer)
    return {
        "step_s": times[WARM_UP:],
        "asked": {name: after[name] - before[name] for name in after},
        "kinds": kinds_of(results[0].timeline, simulated, results[0].launches),
        "simulated_s": simulated.makespan_ns / 1e9,
    }


def simulated_step(trainer: roundel.Trainer) -> Timeline:
    """The last step, simulated with what the trainer measured."""
    ready = trainer._ready
    assert ready is not None
    plan = trainer.policy.plan(ready.work, trainer.step_number - 1)
    return simulate_program(lower([plan], ready.work), "simulated")


def asked(arguments: argparse.Namespace) -> dict[str, int]:
    """What the allocators of all GPUs have asked of the driver so far."""
    stats = [torch.cuda.memory_stats(gpu) for gpu in gpus_of(devices_of(arguments))]
    return {name: sum(each.get(name, 0) for each in stats) for name in ASKED}


def kinds_of(
    measured: Timeline, simulated: Timeline, launches: list[Launch]
) -> dict[str, dict[str, float]]:
    """By lane and kind: tasks, milliseconds in all, median and ninth decile, and the simulated.

    Of ops also how long the host took to launch one, and of how many the GPU waited for it.
    """
    rows, expected_times = {}, _times(simulated)
    hosts: dict[str, list[float]] = defaultdict(list)
    late: dict[str, int] = defaultdict(int)
    for each in launches:
        hosts[f"{each.lane} {each.kind}"].append(each.host_ns / 1e6)
        late[f"{each.lane} {each.kind}"] += each.late
    for key, times in _times(measured).items():
        expected = expected_times.get(key, [0.0])
        rows[key] = {
            "tasks": len(times),
            "all_ms": sum(times),
            "simulated_ms": sum(expected),
            "median_ms": median(times),
            "ninth_decile_ms": quantiles(times, n=10)[-1] if len(times) > 1 else times[0],
            "simulated_median_ms": median(expected),
            "host_median_ms": median(hosts[key]) if key in hosts else 0.0,
            "host_ninth_decile_ms": quantiles(hosts[key], n=10)[-1] if len(hosts[key]) > 1 else 0.0,
            "late": late[key],
        }
    return rows


def _times(timeline: Timeline) -> dict[str, list[float]]:
    times = defaultdict(list)
    spans = (timeline.end_ns - timeline.start_ns) / 1e6
    for kind, lane, span in zip(timeline.kind, timeline.lane, spans.tolist(), strict=True):
        times[f"{timeline.lanes[lane].name} {KINDS[kind]}"].append(span)
    return dict(sorted(times.items()))


def gaps_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """How long streams that compute stood still, of a Chrome trace's events (microseconds).

    The host was late from the stream's end until it had launched the next kernel; for the rest the
    kernel had to wait for something else. Copies on the same stream are work, too.
    """
    calls = [each for each in events if each.get("cat") in ("cuda_runtime", "cuda_driver")]
    launch = {_correlation(each): each for each in calls}
    before = _call_before(calls)
    late: dict[str, list[float]] = defaultdict(list)
    streams = {}
    for stream, kernels in _compute_streams(events).items():
        busy = sum(each["dur"] for each in kernels)
        found = {"busy_ms": busy / 1e3, "late_ms": 0.0, "waited_ms": 0.0, "late": 0, "waited": 0}
        end = kernels[0]["ts"] + kernels[0]["dur"]
        for kernel in kernels[1:]:
            gap, call = kernel["ts"] - end, launch.get(_correlation(kernel))
            if gap > GAP_US and call is not None:
                by_us = min(gap, max(0.0, call["ts"] + call["dur"] - end))
                found["late_ms"] += by_us / 1e3
                found["waited_ms"] += (gap - by_us) / 1e3
                is_late = by_us > gap / 2
                found["late" if is_late else "waited"] += 1
                if is_late:
                    late[before.get(id(call), "nothing")].append(by_us / 1e3)
            end = max(end, kernel["ts"] + kernel["dur"])
        streams[stream] = found
    after = {
        name: {"times": len(each), "all_ms": sum(each), "longest_ms": max(each)}
        for name, each in sorted(late.items(), key=lambda pair: -sum(pair[1]))
    }
    return {"streams": streams, "late_after": after, "calls": _by_name(calls)}


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _compute_streams(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Kernels by stream, in order, of the stream of each GPU that has most of them."""
    by_stream: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for each in events:
        if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            by_stream[each["args"].get("device"), each["args"].get("stream")].append(each)
    result = {}
    for device in sorted({device for device, _ in by_stream}, key=str):
        mine = [kernels for (place, _), kernels in by_stream.items() if place == device]
        longest = max(mine, key=lambda kernels: sum(each["dur"] for each in kernels))
        result[f"gpu{device}"] = sorted(longest, key=lambda each: each["ts"])
    return result


def _call_before(calls: list[dict[str, Any]]) -> dict[int, str]:
    """What a thread did before each call: another, or for how long none."""
    by_thread = defaultdict(list)
    for each in calls:
        by_thread[each.get("tid")].append(each)
    before = {}
    for mine in by_thread.values():
        mine.sort(key=lambda each: each["ts"])
        for earlier, each in pairwise(mine):
            pause = each["ts"] - earlier["ts"] - earlier["dur"]
            long = "in" if earlier["dur"] > pause else "a pause after"
            before[id(each)] = f"{long} {earlier['name']}"
    return before


def _by_name(calls: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    times = defaultdict(list)
    for each in calls:
        times[each["name"]].append(each["dur"] / 1e3)
    rows = {
        name: {"calls": len(each), "all_ms": sum(each), "longest_ms": max(each)}
        for name, each in times.items()
    }
    return dict(sorted(rows.items(), key=lambda pair: -pair[1]["all_ms"]))


def profiled(trainer: roundel.Trainer, arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """One step under the profiler."""
    data = batches(arguments)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    if not torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        trainer.step(*data[0])
        wait_for(trainer)
    profile.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return gaps_of(json.load(file)["traceEvents"])


def print_all(name: str, figures: dict[str, Any]) -> None:
    """The tables of one policy."""
    steps = " ".join(f"{each:.3f}" for each in figures["step_s"])
    print(f"\n{name}: steps {steps} s, simulated {figures['simulated_s']:.3f} s")
    print("asked of the driver:", ", ".join(f"{key} {n}" for key, n in figures["asked"].items()))
    head = f"{'lane and kind':24} {'tasks':>6} {'ms':>9} {'simulated':>9} {'median':>8} {'9/10':>8}"
    print(f"{head} {'host':>8} {'9/10':>8} {'late':>5}")
    for key, row in figures["kinds"].items():
        print(
            f"{key:24} {row['tasks']:6} {row['all_ms']:9,.1f} {row['simulated_ms']:9,.1f} "
            f"{row['median_ms']:8.3f} {row['ninth_decile_ms']:8.3f} "
            f"{row['host_median_ms']:8.3f} {row['host_ninth_decile_ms']:8.3f} {row['late']:5}"
        )
    for stream, row in figures["gaps"]["streams"].items():
        print(
            f"{stream}: kernels {row['busy_ms']:,.0f} ms; the host was late {row['late']} times, "
            f"{row['late_ms']:,.0f} ms; waited {row['waited']} times, {row['waited_ms']:,.0f} ms"
        )
    for what in ("late_after", "calls"):
        for key, row in list(figures["gaps"][what].items())[:12]:
            print(f"  {what} {key}: {json.dumps({k: round(v, 2) for k, v in row.items()})}")
    sys.stdout.flush()


def main() -> None:
    """One policy after the other."""
    parser = parser_of(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = about()
    results = {}
    names = names_of(arguments.systems)
    if not {name for name in names if not name.endswith("]")} <= set(POLICIES):
        parser.error(f"--systems: of these, {'; '.join(POLICIES)}")
    for name in names:
        try:
            with trainer_of(name, arguments) as trainer:
                figures = steps_of(trainer, arguments)
                path = arguments.out / f"{slug_of(name)}.profile.json.gz"
                figures["gaps"] = profiled(trainer, arguments, path)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        results[name] = figures
        print_all(name, figures)
        report = {"about": said, "results": results}
        (arguments.out / "step_profile.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
