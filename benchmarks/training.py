"""Training as fast as with the whole GPU: Roundel at a memory cap against plain resident PyTorch.

    python benchmarks/training.py --out FOLDER [--model qwen3-1.7b] [--memory 24GiB]
        [--systems plain,round-robin] [--devices cuda:0] [--steps 6]

The same model, batch, seed and dtype in every system, each in a process of its own; the cap is
enforced for all but `plain`, which is the limit: all weights resident, bf16 weights and AdamW
states, activation checkpointing per block. Roundel keeps float32 masters and states on the host
and is exact. Prints a table with losses beside tokens/s; writes JSON, timelines and their pictures.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import roundel
from roundel.analysis.chrome import write_chrome_trace
from roundel.analysis.metrics import measure
from roundel.analysis.timeline_picture import draw_timeline
from roundel.executor.decoder import decoder_layers
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss

Result = dict[str, Any]
SYSTEMS: dict[str, Callable[[int], roundel.Policy]] = {
    "round-robin": lambda microbatches: roundel.RoundRobin(round_size=microbatches),
    "round-robin, in rounds": lambda microbatches: roundel.RoundRobin(),
    "round-robin, stale": lambda microbatches: roundel.RoundRobin(
        round_size=microbatches, optimizer="stale"
    ),
    "layer-to-layer": lambda microbatches: roundel.LayerToLayer(),
    "layer-to-layer, stale": lambda microbatches: roundel.LayerToLayer(optimizer="stale"),
    "1f1b": lambda microbatches: roundel.OneFOneB(recompute="early"),
    "interleaved-1f1b": lambda microbatches: roundel.Interleaved1F1B(recompute="early"),
}
"""Policies by name, given the microbatches of a step."""


def make_layers(arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> list[nn.Module]:
    """The model, with the same weights every time; they are drawn on a GPU, which is quicker."""
    torch.manual_seed(0)
    preset = PRESETS[arguments.model]
    layers = decoder_layers(
        preset.shape,
        rotary_base=preset.rotary_base,
        device="meta",
        dtype=torch.float32,
        head_in_loss=arguments.head_in_loss,
    )
    drawn = torch.Generator(device="cuda:0").manual_seed(0)
    for layer in layers:
        layer.to_empty(device="cuda:0")
        for part in layer.parameters():
            with torch.no_grad():
                part.fill_(1.0) if part.ndim == 1 else part.normal_(std=0.02, generator=drawn)
        layer.to(device, dtype)
    torch.cuda.empty_cache()
    return layers


def batches(arguments: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Two batches of random tokens that take turns: the loss can fall."""
    numbers = torch.Generator().manual_seed(1)
    size = (arguments.microbatches * arguments.sequences, arguments.sequence + 1)
    vocabulary = PRESETS[arguments.model].shape.vocabulary
    made = [torch.randint(vocabulary, size, generator=numbers) for _ in range(2)]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in made]


def timed(step: Callable[[Tensor, Tensor], float], arguments: argparse.Namespace) -> Result:
    """Losses, and the time of each step after two to warm up."""
    data, losses, times = batches(arguments), [], []
    for number in range(arguments.steps + 2):
        start = time.perf_counter()
        losses.append(step(*data[number % 2]))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = sorted(times[2:])[len(times[2:]) // 2]
    return {
        "losses": losses,
        "step_s": times,
        "median_step_s": seconds,
        "tokens_per_s": data[0][0].numel() / seconds,
    }


def plain(arguments: argparse.Namespace) -> Result:
    """All resident on one GPU, bf16, fused AdamW, blocks checkpointed."""
    layers = make_layers(arguments, "cuda:0", torch.bfloat16)
    parameters = [each for layer in layers for each in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> float:
        total = torch.zeros((), device="cuda:0")
        parts = zip(
            inputs.chunk(arguments.microbatches), targets.chunk(arguments.microbatches), strict=True
        )
        for x, y in parts:
            value = layers[0](x.to("cuda:0", non_blocking=True))
            for layer in layers[1:-1]:
                value = checkpoint(layer, value, use_reentrant=False)
            loss = token_loss(layers[-1](value), y.to("cuda:0", non_blocking=True))
            (loss / arguments.microbatches).backward()
            total += loss.detach() / arguments.microbatches
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return timed(step, arguments)


def ours(name: str, arguments: argparse.Namespace) -> Result:
    """A policy of Roundel at the memory cap."""
    devices = arguments.devices.split(",")
    policy = SYSTEMS[name](arguments.microbatches)
    with roundel.Trainer(
        make_layers(arguments, "cpu", torch.float32),
        token_loss,
        policy=policy,
        optimizer=partial(torch.optim.AdamW, lr=arguments.lr, fused=True),
        devices=devices,
        microbatches=arguments.microbatches,
        memory_limit=arguments.memory,
        compute_dtype=torch.bfloat16,
    ) as trainer:
        last: list[roundel.StepResult] = []

        def step(inputs: Tensor, targets: Tensor) -> float:
            last[:] = [trainer.step(inputs, targets)]
            return last[0].loss

        result = timed(step, arguments)
        trainer.flush()
        timeline = last[0].timeline
    slug = name.replace(", ", "-").replace(" ", "-")
    write_chrome_trace(timeline, arguments.out / f"{slug}.json.gz")
    draw_timeline(timeline, arguments.out / f"{slug}.png")
    metrics = measure(timeline).to_json(name)
    return {**result, "timeline": metrics, "trace": json.loads(trainer.trace.model_dump_json())}


def run_one(name: str, arguments: argparse.Namespace) -> None:
    """One system; writes its result."""
    result = plain(arguments) if name == "plain" else ours(name, arguments)
    names = {"cuda:0"} if name == "plain" else set(arguments.devices.split(","))
    result["peak_allocated_bytes"] = max(torch.cuda.max_memory_allocated(each) for each in names)
    (arguments.out / f"{name}.result.json").write_text(json.dumps(result))


def main() -> None:
    """Every system in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-1.7b", choices=sorted(PRESETS))
    parser.add_argument("--systems", default="plain,round-robin")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--memory", default="24GiB")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=4, help="in a microbatch")
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="after two to warm up")
    parser.add_argument("--head-in-loss", action="store_true", help="logits in parts, for all")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        run_one(arguments.one, arguments)
        return
    about = {
        "gpu": torch.cuda.get_device_name(0),
        "host_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "roundel": version("roundel"),
        "command": " ".join(["python", *sys.argv]),
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"{'system':38} {'tokens/s':>9} {'share':>6} {'step s':>7} {'GiB':>6}  losses")
    results: dict[str, Result] = {}
    for name in _names(arguments.systems):
        call = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        if subprocess.run(call, check=False).returncode:
            print(f"{name:38} failed")
            continue
        result = json.loads((arguments.out / f"{name}.result.json").read_text())
        results[name] = result
        _print_row(name, result, results.get("plain"), len(arguments.devices.split(",")))
    (arguments.out / "training.json").write_text(json.dumps({"about": about, "results": results}))


def _names(text: str) -> list[str]:
    """Names of systems: those that are split by a comma without a space behind it."""
    if text == "all":
        return ["plain", *SYSTEMS]
    return [each.replace("\0", ", ") for each in text.replace(", ", "\0").split(",")]


def _print_row(name: str, result: Result, limit: Result | None, devices: int) -> None:
    whole = limit["tokens_per_s"] * (1 if name == "plain" else devices) if limit else 0
    share = f"{result['tokens_per_s'] / whole:6.3f}" if whole else "     -"
    losses = " ".join(f"{each:.3f}" for each in result["losses"][:2] + result["losses"][-2:])
    print(
        f"{name:38} {result['tokens_per_s']:9,.0f} {share} {result['median_step_s']:7.3f} "
        f"{result['peak_allocated_bytes'] / 2**30:6.2f}  {losses}",
        flush=True,
    )


if __name__ == "__main__":
    main()
