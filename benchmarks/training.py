"""Training as fast as with the whole GPU: Roundel and others against plain resident PyTorch.

    python benchmarks/training.py --out FOLDER [--model qwen3-1.7b] [--memory 24GiB]
        [--systems plain,round-robin,fsdp2-offload] [--devices cuda:0] [--steps 6]
    ... --systems "plain,layer-to-layer[optimizer_on=device],1f1b[partition=17 13]"

The same model, batch, seed and dtype in every system, each in a process of its own. `plain` is the
limit: all weights resident, bf16 weights and AdamW states, activation checkpointing per block, no
cap; a share is of that times the devices. `plain, on each GPU at once`, a model for each, is what
they can do together. Roundel's and torch's resident pipelines are without a cap, too. It is
enforced for all others; there Roundel keeps float32 masters and states on the host. It is exact
either way. `peers/` has the others, each with its settings in its docstring. Prints a table with
losses beside tokens/s; writes JSON, timelines and their pictures, and a log for each system.

`--devices cpu,cpu --model decoder-tiny --sequence 32 --dtype float32` tries it without a GPU;
the losses of all that are not stale agree there to 1e-5.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from about import about
from peers.plain import plain
from torch import Tensor
from training_common import (
    Result,
    devices_of,
    dtype_of,
    make_layers,
    peak_bytes,
    timed,
    wait_for_gpu,
)

import roundel
from roundel.analysis.chrome import write_chrome_trace
from roundel.analysis.metrics import measure
from roundel.analysis.timeline_picture import draw_timeline
from roundel.executor.places import allocator_retries
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.policies.streamed import Streamed

Arguments = argparse.Namespace

POLICIES: dict[str, Callable[[Arguments], roundel.Policy]] = {
    "round-robin": lambda given: roundel.RoundRobin(round_size=given.microbatches),
    "round-robin, in rounds": lambda given: roundel.RoundRobin(),
    "round-robin, stale": lambda given: roundel.RoundRobin(
        round_size=given.microbatches, optimizer="stale"
    ),
    "layer-to-layer": lambda given: roundel.LayerToLayer(),
    "layer-to-layer, activations kept": lambda given: roundel.LayerToLayer(activations="device"),
    "round-robin, states through the GPU": lambda given: roundel.RoundRobin(
        round_size=given.microbatches, optimizer_on="device"
    ),
    "round-robin, states through the GPU, activations kept": lambda given: roundel.RoundRobin(
        round_size=given.microbatches, optimizer_on="device", activations="device"
    ),
    "layer-to-layer, states through the GPU": lambda given: roundel.LayerToLayer(
        optimizer_on="device"
    ),
    "layer-to-layer, stale": lambda given: roundel.LayerToLayer(optimizer="stale"),
    "1f1b": lambda given: roundel.OneFOneB(partition=given.cut, recompute="needed"),
    "1f1b, by layer": lambda given: roundel.OneFOneB(
        partition=given.cut, recompute="needed", recompute_layers=1
    ),
    "interleaved-1f1b": lambda given: roundel.Interleaved1F1B(
        partition=given.interleaved_cut, recompute="needed"
    ),
}
"""Policies by name."""

PEERS = {
    "plain, on each GPU at once": ("plain_on_each", ""),
    "torch-1f1b": ("torch_pipeline", "1f1b"),
    "torch-gpipe": ("torch_pipeline", "gpipe"),
    "torch-interleaved-1f1b": ("torch_pipeline", "interleaved-1f1b"),
    "fsdp2-offload": ("fsdp2", "each"),
    "fsdp2-offload, gradients kept": ("fsdp2", "last"),
    "roundpipe": ("roundpipe", "async"),
    "roundpipe, sync": ("roundpipe", "sync"),
}
"""Others by name: the file in `peers/` and what its `train` is told."""


def peer(name: str, arguments: Arguments) -> Result:
    """Another system; imported only now, so that one that cannot be is no other's trouble."""
    file, variant = PEERS[name]
    result: Result = import_module(f"peers.{file}").train(variant, arguments)
    return result


def trainer_of(name: str, arguments: Arguments) -> roundel.Trainer:
    """A trainer by one of our policies: one that streams at the memory cap, with masters as
    `--masters` says; a resident one as `plain`."""
    policy = POLICIES[name](arguments) if name in POLICIES else roundel.make_policy(name)
    streams = isinstance(policy, Streamed)
    return roundel.Trainer(
        make_layers(
            arguments, "cpu", getattr(torch, arguments.masters if streams else arguments.dtype)
        ),
        token_loss,
        policy=policy,
        optimizer=partial(torch.optim.AdamW, lr=arguments.lr, fused=True),
        devices=devices_of(arguments),
        microbatches=arguments.microbatches,
        memory_limit=arguments.memory if streams else 0,
        compute_dtype=dtype_of(arguments),
    )


def wait_for(trainer: roundel.Trainer) -> None:
    """Until a trainer's steps have ended, with all that goes on behind them."""
    trainer.flush()
    wait_for_gpu()


def ours(name: str, arguments: Arguments) -> Result:
    """A policy of Roundel."""
    with trainer_of(name, arguments) as trainer:
        last: list[roundel.StepResult] = []

        def step(inputs: Tensor, targets: Tensor) -> float:
            last[:] = [trainer.step(inputs, targets)]
            return float(last[0].loss)

        result = timed(step, arguments, lambda: wait_for(trainer))
        timeline = last[0].timeline
    write_chrome_trace(timeline, arguments.out / f"{slug_of(name)}.json.gz")
    draw_timeline(timeline, arguments.out / f"{slug_of(name)}.png")
    peaks = [peak_bytes(device) for device in devices_of(arguments)]
    return {
        **result,
        "peak_allocated_bytes": max((each for each in peaks if each is not None), default=None),
        "allocator_retries": allocator_retries(devices_of(arguments)),
        "timeline": measure(timeline).to_json(name),
        "trace": json.loads(trainer.trace.model_dump_json()),
        "machine": json.loads(trainer.machine.model_dump_json()) if trainer.machine else None,
    }


SYSTEMS: dict[str, Callable[[Arguments], Result]] = {
    "plain": plain,
    **{name: partial(ours, name) for name in POLICIES},
    **{name: partial(peer, name) for name in PEERS},
}


def main() -> None:
    """Every system in a process of its own, then the table."""
    arguments = _parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        status = run_one(arguments.one, arguments)
        # Threads of other systems may not end by themselves.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    said = about()
    print(f"{'system':38} {'tokens/s':>9} {'share':>6} {'step s':>7} {'GiB':>6}  losses")
    results: dict[str, Result] = {}
    for name in names_of(arguments.systems):
        failure = _run_apart(name, arguments)
        if failure:
            print(f"{name:38} {failure}", flush=True)
            continue
        result = json.loads((arguments.out / f"{name}.result.json").read_text())
        results[name] = result
        _print_row(name, result, results.get("plain"), len(devices_of(arguments)))
    (arguments.out / "training.json").write_text(json.dumps({"about": said, "results": results}))


def run_one(name: str, arguments: Arguments) -> int:
    """One system; writes its result, or why there is none. Returns the exit status."""
    try:
        if name not in SYSTEMS and not name.endswith("]"):
            raise roundel.InputError(f"no such system; they are {'; '.join(SYSTEMS)}")
        result = SYSTEMS.get(name, partial(ours, name))(arguments)
    except roundel.InputError as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        known = isinstance(error, RuntimeError)
        reason = "failed: " + (lines[0] if known else f"{type(error).__name__}: {lines[0]}")
    else:
        (arguments.out / f"{name}.result.json").write_text(json.dumps(result))
        return 0
    (arguments.out / f"{name}.failure.txt").write_text(reason)
    return 1


def _run_apart(name: str, arguments: Arguments) -> str:
    """Run a system in a process of its own; why it has no result, in one line, or nothing."""
    reason, log = (arguments.out / f"{name}.{end}" for end in ("failure.txt", "log"))
    for path in (reason, arguments.out / f"{name}.result.json"):
        path.unlink(missing_ok=True)
    call = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    # Near a cap memory in pieces is no good to anybody; `roundel train` sets this, too.
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    # A session of its own, so that whatever it started ends with it.
    with (
        log.open("w") as written,
        subprocess.Popen(
            call, stdout=written, stderr=written, start_new_session=True, env=environment
        ) as process,
    ):
        try:
            status = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            return f"failed: took longer than {arguments.timeout} s; see {log}"
        finally:
            _end_session(process)
    if status and reason.exists():
        return str(reason.read_text())[:300]
    return f"failed: ended with {status}; see {log}" if status else ""


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options of whatever trains these models."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-1.7b", choices=sorted(PRESETS))
    parser.add_argument("--systems", default="plain,round-robin", help="or all")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--masters",
        default="float32",
        choices=["bfloat16", "float32"],
        help="of policies that stream; bfloat16, as all others have, takes half the host's memory",
    )
    parser.add_argument("--memory", default="24GiB")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=4, help="in a microbatch")
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="after two to warm up")
    parser.add_argument("--head-in-loss", action="store_true", help="logits in parts, for all")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--cut",
        type=_numbers,
        help="layers per stage of 1f1b and torch's schedules, as in 15,15, embedding and head "
        "among them (default: 1f1b's as measured, torch's by FLOPs)",
    )
    parser.add_argument(
        "--interleaved-cut", type=_numbers, help="the same of both interleaved-1f1b"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a system")
    return parser


def _parsed() -> Arguments:
    parser = parser_of(__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def names_of(text: str) -> list[str]:
    """Names of systems: those that are split by a comma without a space behind it.

    One of ours may also be a policy's name with its knobs, as in 1f1b[recompute=late].
    """
    return list(SYSTEMS) if text == "all" else re.split(r",(?! )(?![^\[]*\])", text)


def slug_of(name: str) -> str:
    """A name of files for a system."""
    return name.replace(", ", "-").replace(" ", "-")


def _print_row(name: str, result: Result, limit: Result | None, devices: int) -> None:
    whole = limit["tokens_per_s"] * (1 if name == "plain" else devices) if limit else 0
    share = f"{result['tokens_per_s'] / whole:6.3f}" if whole else "     -"
    peak = result["peak_allocated_bytes"]
    memory = "     -" if peak is None else f"{peak / 2**30:6.2f}"
    losses = " ".join(f"{each:.3f}" for each in result["losses"][:2] + result["losses"][-2:])
    print(
        f"{name:38} {result['tokens_per_s']:9,.0f} {share} {result['mean_step_s']:7.3f} "
        f"{memory}  {losses}",
        flush=True,
    )


if __name__ == "__main__":
    main()
