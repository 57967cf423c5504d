"""The executor on a GPU: gradients against float32, and training curves against plain PyTorch.

    python benchmarks/executor_gpu.py --out FOLDER [--devices cuda:0,cuda:0] [--memory 24GiB]

Several times the same device makes virtual devices on one GPU. Prints a table, writes
`executor_gpu.json`, the picture of the curves and of a real step of each policy.
"""

import argparse
import copy
import json
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from about import about
from torch import Tensor, nn

import roundel
from roundel.analysis.loss_picture import draw_losses
from roundel.analysis.metrics import measure
from roundel.analysis.timeline_picture import draw_timeline
from roundel.executor.decoder import decoder_layers
from roundel.executor.measure_machine import measure_machine
from roundel.executor.places import find_devices, memory_limits
from roundel.executor.token_loss import token_loss
from roundel.traces.machine import Machine
from roundel.traces.shapes import DecoderShape

SHAPE = DecoderShape(
    hidden=512, layers=6, heads=8, kv_heads=4, head_size=64, ffn=1536, vocabulary=256
)
POLICIES = {
    "gpipe": roundel.GPipe(),
    "1f1b, recompute": roundel.OneFOneB(recompute="late"),
    "interleaved-1f1b": roundel.Interleaved1F1B(),
    "looped-bfs": roundel.LoopedBFS(),
    "zb-h1": roundel.ZBH1(weight_share=0.5),
    "zb-v": roundel.ZBV(weight_share=0.5),
    "round-robin": roundel.RoundRobin(),
    "round-robin, states through the GPU": roundel.RoundRobin(optimizer_on="device"),
    "round-robin, stale": roundel.RoundRobin(optimizer="stale"),
    "layer-to-layer": roundel.LayerToLayer(),
}


def text_batches(steps: int, batch: int, sequence: int) -> list[tuple[Tensor, Tensor]]:
    """Bytes of Python's own standard library, as (inputs, targets) of shape (batch, sequence)."""
    folder = Path(json.__file__).parents[1]
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    numbers = torch.Generator().manual_seed(0)
    result = []
    for _ in range(steps):
        start = torch.randint(len(data) - sequence - 1, (batch,), generator=numbers).tolist()
        rows = torch.stack([data[place : place + sequence + 1] for place in start])
        result.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return result


def make_layers() -> list[nn.Module]:
    """The same float32 model every time."""
    torch.manual_seed(0)
    return decoder_layers(SHAPE)


def make_trainer(
    policy: roundel.Policy, optimizer: Any, arguments: argparse.Namespace, **options: Any
) -> roundel.Trainer:
    """A trainer on the devices asked for, with the memory capped."""
    return roundel.Trainer(
        make_layers(),
        token_loss,
        policy=policy,
        optimizer=optimizer,
        devices=arguments.devices.split(","),
        microbatches=arguments.microbatches,
        memory_limit=arguments.memory,
        machine=machine_of(arguments.devices),
        **options,
    )


@lru_cache
def machine_of(devices: str) -> Machine:
    """Links and rates, measured once."""
    places = find_devices(devices.split(","))
    return measure_machine(places, memory_limits(places, 0), torch.optim.AdamW, torch.bfloat16)


def plain_gradients(batch: tuple[Tensor, Tensor], device: str) -> dict[str, Tensor]:
    """Float32 gradients of the unsplit model."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = nn.Sequential(*make_layers()).to(device)
    token_loss(model(batch[0].to(device)), batch[1].to(device)).backward()
    return {name: each.grad.cpu() for name, each in model.named_parameters()}  # type: ignore[union-attr]


def gradient_error(
    policy: roundel.Policy,
    batch: tuple[Tensor, Tensor],
    reference: dict[str, Tensor],
    arguments: argparse.Namespace,
    compute: torch.dtype | None,
) -> float:
    """Largest relative error of any parameter's gradient: with SGD at rate 1 it is the change."""
    sgd = partial(torch.optim.SGD, lr=1.0)
    with make_trainer(policy, sgd, arguments, compute_dtype=compute) as trainer:
        before = trainer.state_dict()
        trainer.step(*batch)
        after = trainer.state_dict()
    worst = 0.0
    for name, expected in reference.items():
        got = before[name].double() - after[name].double()
        error = (got - expected.double()).norm() / expected.double().norm()
        worst = max(worst, float(error))
    return worst


def plain_training(
    batches: list[tuple[Tensor, Tensor]], device: str, microbatches: int, stale: bool = False
) -> list[float]:
    """Losses of plain PyTorch in bf16 with float32 masters, one batch at a time.

    stale: each update is made while the next batch is at work, on the weights before it.
    """
    masters = nn.Sequential(*make_layers()).to(device)
    model = copy.deepcopy(masters).bfloat16()
    steps = torch.optim.AdamW(masters.parameters(), lr=3e-4)
    losses, waiting = [], None
    for inputs, targets in batches:
        model.zero_grad()
        total = 0.0
        parts = (each.to(device).chunk(microbatches) for each in (inputs, targets))
        for x, y in zip(*parts, strict=True):
            loss = token_loss(model(x), y) / microbatches
            loss.backward()
            total += float(loss.detach())
        grads = [each.grad.float() for each in model.parameters()]  # type: ignore[union-attr]
        due, waiting = (waiting, grads) if stale else (grads, None)
        losses.append(total)
        if due is None:
            continue
        for master, grad in zip(masters.parameters(), due, strict=True):
            master.grad = grad
        steps.step()
        with torch.no_grad():
            for master, each in zip(masters.parameters(), model.parameters(), strict=True):
                each.copy_(master)
    return losses


def train(
    name: str,
    policy: roundel.Policy,
    batches: list[tuple[Tensor, Tensor]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Losses, speed and memory of one policy."""
    devices = set(arguments.devices.split(","))
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    adamw = partial(torch.optim.AdamW, lr=3e-4)
    with make_trainer(policy, adamw, arguments, compute_dtype=torch.bfloat16) as trainer:
        losses = [trainer.step(*batches[0]).loss]
        start = time.perf_counter()
        for batch in batches[1:]:
            result = trainer.step(*batch)
            losses.append(result.loss)
        timeline = result.timeline
        seconds = time.perf_counter() - start
    draw_timeline(timeline, arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    tokens = batches[0][0].numel() * (len(batches) - 1)
    return {
        "losses": losses,
        "tokens_per_s": tokens / seconds,
        "peak_allocated_bytes": max(torch.cuda.max_memory_allocated(each) for each in devices),
        "last_step": measure(timeline).to_json(name),
    }


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="cuda:0,cuda:0")
    parser.add_argument("--memory", default="24GiB")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--policies", help="some of them, with semicolons between")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = arguments.devices.split(",")[0]
    said = about(devices=arguments.devices, memory=arguments.memory)
    batches = text_batches(arguments.steps, batch=32, sequence=256)
    reference = plain_gradients(batches[0], first)
    chosen = arguments.policies.split(";") if arguments.policies else list(POLICIES)
    curves = {"plain PyTorch": plain_training(batches, first, arguments.microbatches)}
    if any(getattr(POLICIES[name], "optimizer", "sync") == "stale" for name in chosen):
        stale = plain_training(batches, first, arguments.microbatches, stale=True)
        curves["plain PyTorch, one step stale"] = stale
    results: dict[str, Any] = {}
    print(
        f"{'policy':36} {'grad f32':>9} {'grad bf16':>9} {'last 20':>8} {'tokens/s':>9} {'GiB':>6}"
    )
    for name, losses in curves.items():
        print(f"{name:36} {'':9} {'':9} {sum(losses[-20:]) / 20:8.4f}")
    plain = dict(curves)
    for name in chosen:
        policy = POLICIES[name]
        exact = gradient_error(policy, batches[0], reference, arguments, None)
        half = gradient_error(policy, batches[0], reference, arguments, torch.bfloat16)
        result = train(name, policy, batches, arguments)
        curves[name] = result["losses"]
        results[name] = {"gradient_f32": exact, "gradient_bf16": half, **result}
        end = sum(result["losses"][-20:]) / 20
        print(
            f"{name:36} {exact:9.2e} {half:9.2e} {end:8.4f} {result['tokens_per_s']:9,.0f} "
            f"{result['peak_allocated_bytes'] / 2**30:6.2f}",
            flush=True,
        )
        report = {"about": said, "plain": plain, "policies": results}
        (arguments.out / "executor_gpu.json").write_text(json.dumps(report))
    draw_losses(
        curves,
        arguments.out / "losses.png",
        "Training on Python's standard library: every policy over plain PyTorch",
        f"{said['gpu']}, devices {arguments.devices}, {arguments.memory} each, bf16",
    )


if __name__ == "__main__":
    main()
