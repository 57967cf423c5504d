"""Models and contexts that are said not to fit: what is predicted first, then what happens.

    python benchmarks/frontier.py llama-3.1-8b --out FOLDER --sequence 65536 --ffn-chunk 16384
    python benchmarks/frontier.py llama-3.1-8b --out FOLDER --ffn-chunk 16384 --longest
    python benchmarks/frontier.py qwen3-32b --out FOLDER --batch 8 --microbatches 2
        --optim torchao.optim.AdamW4bit --optim-options '{"bf16_stochastic_round": true}'
        --optimizer-on device

One layer of each kind is measured without the model's weights, every candidate of `--policy auto`
(or the one that is named) is simulated, and the winner trains for real on one batch again and again
with bf16 weights (`--dtype float32 --compute-dtype bfloat16`: with float32 masters). `--longest`
looks for the longest context first, in steps of 8,192 tokens, that leaves room to spare. Prints
predicted beside measured; writes JSON, the picture of the last step, and its Chrome trace.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from about import about
from rich.console import Console
from training_common import cap_memory

from roundel.analysis.chrome import write_chrome_trace
from roundel.analysis.metrics import measure
from roundel.analysis.timeline_picture import draw_timeline
from roundel.api import Simulation, simulate_work
from roundel.auto import choose
from roundel.executor.places import count_peaks_anew
from roundel.executor.training_setup import is_out_of_memory, set_rate
from roundel.policies.policy import Policy, policy_name
from roundel.policies.work import Work
from roundel.traces.errors import InputError
from roundel.train_job import Job, with_gaps
from roundel.train_settings import read_settings

GIB = 2**30
STRIDE = 8192
"""Contexts that are tried differ by so many tokens."""


class HostMemory:
    """How much more of the host's memory is in use than at the start, at most; looks often."""

    def __init__(self) -> None:
        self._before, self.peak_bytes = _host_in_use(), 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                self.peak_bytes = max(self.peak_bytes, _host_in_use() - self._before)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _host_in_use() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    return (kib["MemTotal"] - kib["MemAvailable"]) * 1024


def job_of(arguments: argparse.Namespace, sequence: int) -> Job:
    """The training, as `roundel train` makes it."""
    settings: dict[tuple[str, str], Any] = {
        ("model", "name"): arguments.model,
        ("model", "dtype"): arguments.dtype,
        ("model", "compute_dtype"): arguments.compute_dtype,
        ("model", "ffn_chunk"): arguments.ffn_chunk,
        ("data", "sequence"): sequence,
        ("data", "held_out"): 0.0,
        ("policy", "name"): arguments.policy,
        ("policy", "optimizer_on"): arguments.optimizer_on,
        ("policy", "activations"): arguments.activations,
        ("train", "devices"): arguments.devices,
        ("train", "batch"): arguments.batch,
        ("train", "microbatches"): arguments.microbatches,
        ("train", "optimizer"): arguments.optim,
        ("train", "options"): json.loads(arguments.optim_options),
        ("train", "lr"): arguments.lr,
        ("train", "memory"): arguments.memory,
        ("train", "host_memory"): arguments.host_memory,
    }
    flags = {("--" + field, section, field): each for (section, field), each in settings.items()}
    return Job.of(read_settings(None, flags), empty=True)


def planned(work: Work, job: Job, arguments: argparse.Namespace) -> Policy:
    """The policy that trains: the one that was named, or the fastest that fits."""
    if arguments.policy != "auto":
        return job.policies[arguments.policy]
    return choose(work, job.policies, Console(), lambda what: None)


def fits(arguments: argparse.Namespace, sequence: int) -> bool:
    """Whether any of the policies fits at this context."""
    job = job_of(arguments, sequence)
    try:
        work = with_gaps(job.measured(repeats=1, split=False))
    except Exception as error:
        if is_out_of_memory(error):
            return False
        raise
    for policy in job.policies.values():
        try:
            if simulate_work(work, policy).metrics.fits:
                return True
        except InputError:
            continue
    return False


def longest(arguments: argparse.Namespace) -> int:
    """The longest context that fits, from the one that was asked for on."""
    low, high = max(1, arguments.sequence // STRIDE), arguments.most // STRIDE + 1
    start = time.perf_counter()
    if not fits(arguments, low * STRIDE):
        sys.exit(f"context {low * STRIDE:,} does not fit: begin with a shorter --sequence")
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(arguments, middle * STRIDE)
        said = "fits" if found else "does not fit"
        print(
            f"context {middle * STRIDE:,}: {said}; {time.perf_counter() - start:.0f} s", flush=True
        )
        low, high = (middle, high) if found else (low, middle)
    return low * STRIDE


def train(
    job: Job, work: Work, policy: Policy, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """Train on one batch again and again; returns what was measured and the last timeline."""
    on_gpu = job.devices[0].type == "cuda"
    losses, seconds, before = [], [], 0
    with job.trainer(policy, work) as trainer:
        batch = job.batches.batch(0)
        for number in range(arguments.steps):
            rises = min(1.0, (number + 1) / max(1, arguments.warmup))
            set_rate(trainer.optimizer, arguments.lr * rises)
            start = time.perf_counter()
            result = trainer.step(*batch)
            seconds.append(time.perf_counter() - start)
            losses.append(result.loss)
            print(f"loss {result.loss:.4f}, {seconds[-1]:.2f} s", flush=True)
            if on_gpu and len(losses) == 1 and arguments.steps > 1:
                before = max(map(torch.cuda.max_memory_reserved, job.devices))
                count_peaks_anew(job.devices)  # The first step also measures the layers.
        timeline = result.timeline
    if on_gpu:
        peaks = [
            max(map(most, job.devices))
            for most in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        ]
    tokens = batch[0].numel()
    return {
        "losses": losses,
        "step_s": seconds,
        "tokens_per_s": tokens / mean(seconds[1:] or seconds),
        "gpu_allocated_bytes": peaks[0] if on_gpu else None,
        "gpu_reserved_bytes": peaks[1] if on_gpu else None,
        "gpu_reserved_bytes_by_the_first_step": before or None,
        "timeline": measure(timeline).to_json(policy_name(policy)),
    }, timeline


def print_table(predicted: Simulation, done: dict[str, Any], host_bytes: int) -> None:
    """What was predicted beside what happened."""
    metrics = predicted.metrics
    rows = [
        ("step, s", metrics.step_s, mean(done["step_s"][1:] or done["step_s"])),
        ("tokens/s", metrics.tokens_per_s, done["tokens_per_s"]),
        ("GPU memory, GiB", *_gib(max(metrics.peak_memory_bytes), done["gpu_allocated_bytes"])),
        ("host memory, GiB", *_gib(metrics.peak_host_memory_bytes, host_bytes)),
    ]
    print(f"{'':18} {'predicted':>10} {'measured':>10}")
    for name, before, after in rows:
        print(f"{name:18} {before:10,.2f} {after:10,.2f}")
    reserved = done["gpu_reserved_bytes"]
    if reserved:
        print(f"reserved by the allocator: {reserved / GIB:.2f} GiB of the GPU")


def _gib(*sizes: int | None) -> list[float]:
    return [(size or 0) / GIB for size in sizes]


def main() -> None:
    """Predict, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--most", type=int, default=2**18, help="no longer context is tried")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--ffn-chunk", type=int)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights that are updated")
    parser.add_argument("--compute-dtype", help="of the weights on the devices")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--optimizer-on", choices=["host", "device"])
    parser.add_argument("--activations", choices=["host", "device"])
    parser.add_argument("--optim", default="AdamW")
    parser.add_argument("--optim-options", default="{}", help="JSON")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=0, help="steps over which the rate rises")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--memory", default="24GiB")
    parser.add_argument("--host-memory")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Gaps between segments of fixed size would count as memory in use.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = about()
    host = HostMemory()
    for name in arguments.devices.split(","):
        cap_memory(arguments, torch.device(name))  # What is measured before is to fit, too.
    with host.watched():
        sequence = longest(arguments) if arguments.longest else arguments.sequence
        job = job_of(arguments, sequence)
        work = job.measured(repeats=3, split=False)
        policy = planned(with_gaps(work), job, arguments)
        predicted = simulate_work(work, policy)
        start = time.perf_counter()
        job = job.loaded()
        loading_s = time.perf_counter() - start
        print(f"context {sequence:,}; made in {loading_s:.0f} s; {policy!r}", flush=True)
        done, timeline = train(job, work, policy, arguments)
    print_table(predicted, done, host.peak_bytes)
    gpu = f"{said['gpu']} capped at {arguments.memory}"
    title = f"{arguments.model}, {sequence:,} tokens a sequence, {gpu}: {timeline.name}"
    draw_timeline(timeline, arguments.out / "step.png", title)
    write_chrome_trace(timeline, arguments.out / "step.json.gz")
    figures = {
        "about": said,
        "context": sequence,
        "policy": repr(policy),
        "predicted": predicted.metrics.to_json(predicted.name),
        "measured": {**done, "host_bytes": host.peak_bytes, "loading_s": loading_s},
        "trace": json.loads(work.trace.model_dump_json()),
        "machine": json.loads(work.machine.model_dump_json()),
    }
    (arguments.out / "frontier.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
