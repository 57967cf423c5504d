"""Low-bit optimizer states and stochastic rounding: their loss curves against float32 AdamW's.

    python benchmarks/low_bit_states.py --out FOLDER [--device cuda:0 --model decoder-100m]

Every run trains the same model from the same float32 draws on the same batches of text, with the
same streamed policy and the same schedule of the learning rate; only what is kept of a weight
differs. float32 AdamW runs once a seed (of the first weights alone), so that a reader sees how far
apart chance brings two of them. The default rate is the best for float32 of 3e-4, 1e-3, 3e-3 and
1e-2 with the default model; at a lower one, such as 1e-4, bf16 loses most updates.

Prints a table; writes `low_bit_states.json` and `low_bit_states.png`. Needs torchao, which
compiles a kernel for each shape of a weight.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from about import about
from torch import Tensor, nn

import roundel
from roundel.analysis.loss_picture import draw_losses
from roundel.executor.decoder import decoder_layers
from roundel.executor.masters import OptimizerFactory
from roundel.executor.presets import PRESETS, Preset
from roundel.executor.text import TextBatches, load_tokens
from roundel.executor.token_loss import token_loss
from roundel.traces.shapes import DecoderShape

Result = dict[str, Any]

MODELS = {
    # Two million parameters in five shapes: on a CPU each costs the compiler seconds.
    "decoder-2m": Preset(DecoderShape(192, 4, 3, 3, 64, 512, vocabulary=256)),
    **PRESETS,
}
LAST = 20
"""Steps at the end whose mean loss is a run's final one."""


@dataclass(frozen=True)
class Case:
    """What a run keeps of a weight: `weights` on the host, `compute` on the device."""

    title: str
    optimizer: str
    weights: torch.dtype
    compute: torch.dtype | None = None
    stochastic: bool = False
    wide_tables: bool = False

    def factory(self, rate: float, vocabulary: int) -> OptimizerFactory:
        """The optimizer, with the same hyperparameters in every case.

        With `wide_tables` the states of the embedding and the head have 8 bits, whatever others do.
        """
        same: dict[str, Any] = {
            "lr": rate,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.01,
        }
        if self.optimizer == "AdamW":
            return partial(torch.optim.AdamW, **same)
        same["bf16_stochastic_round"] = self.stochastic
        if self.wide_tables:
            wide = import_module("roundel.executor.low_bit").AdamW4bit
            return partial(wide, **same, table_rows=vocabulary)
        return partial(getattr(import_module("torchao.optim"), self.optimizer), **same)


REFERENCE = "float32"
CASES = {
    REFERENCE: Case("float32 weights and states", "AdamW", torch.float32),
    "mixed": Case(
        "float32 weights and states, computing in bf16", "AdamW", torch.float32, torch.bfloat16
    ),
    "bf16": Case("bf16 weights and states, plain rounding", "AdamW", torch.bfloat16),
    "8-bit-nearest": Case(
        "bf16 weights, plain rounding, 8-bit states", "AdamW8bit", torch.bfloat16
    ),
    "8-bit": Case(
        "bf16 weights, stochastic rounding, 8-bit states",
        "AdamW8bit",
        torch.bfloat16,
        stochastic=True,
    ),
    "4-bit": Case(
        "bf16 weights, stochastic rounding, 4-bit states",
        "AdamW4bit",
        torch.bfloat16,
        stochastic=True,
    ),
    "4-bit-wide-tables": Case(
        "bf16, stochastic, 4-bit states, 8-bit for tables",
        "AdamW4bit",
        torch.bfloat16,
        stochastic=True,
        wide_tables=True,
    ),
}


def make_layers(arguments: argparse.Namespace, seed: int, dtype: torch.dtype) -> list[nn.Module]:
    """The same draws in every dtype: they are made in float32, then rounded."""
    torch.manual_seed(seed)
    preset = MODELS[arguments.model]
    on_gpu = arguments.device.startswith("cuda")
    layers = decoder_layers(
        preset.shape,
        rotary_base=preset.rotary_base,
        head_in_loss=on_gpu,
        draw_on=arguments.device if on_gpu else None,
    )
    return [layer.to(dtype) for layer in layers]


def schedule(steps: int, step: int) -> float:
    """Up linearly for a tenth of the steps, then down along a cosine to a tenth of the rate."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, steps - warm))
    return 0.1 + 0.45 * (1 + float(torch.cos(torch.pi * done)))


def train(case: Case, seed: int, batches: TextBatches, arguments: argparse.Namespace) -> Result:
    """Losses of every step, held-out losses on the way, and what the host keeps in the end."""
    layers = make_layers(arguments, seed, case.weights)
    steps, every = arguments.steps, max(1, arguments.steps // 6)
    with roundel.Trainer(
        layers,
        token_loss,
        policy=roundel.make_policy(arguments.policy, optimizer_on=arguments.updates),
        optimizer=case.factory(arguments.lr, MODELS[arguments.model].shape.vocabulary),
        devices=[arguments.device],
        microbatches=arguments.microbatches,
        memory_limit=arguments.memory,
        compute_dtype=case.compute,
        seed=seed,
    ) as trainer:
        rates = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, partial(schedule, steps))
        losses, held_out = [], {0: evaluate(trainer, batches)}
        for step in range(steps):
            losses.append(trainer.step(*batches.batch(step)).loss)
            rates.step()
            if step == 0:  # Kernels are compiled for the first.
                trainer.flush()
                start = time.perf_counter()
            if (step + 1) % every == 0 or step + 1 == steps:
                held_out[step + 1] = evaluate(trainer, batches)
        seconds = time.perf_counter() - start
        trained = [each for layer in layers for each in layer.parameters()]
        states = sum(kept_bytes(trainer.optimizer.state[each]) for each in trained)
    count = sum(each.numel() for each in trained)
    copies = case.compute.itemsize if case.compute else 0
    return {
        "losses": losses,
        "held_out": held_out,
        "last_loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "last_held_out": held_out[steps],
        "parameters": count,
        "weight_bytes_per_parameter": case.weights.itemsize + copies,
        "state_bytes_per_parameter": states / count,
        "seconds": seconds,
    }


def evaluate(trainer: roundel.Trainer, batches: TextBatches) -> float:
    """The mean loss on the end of the text, which no run trains on."""
    losses: list[float] = [trainer.evaluate(*pair) for pair in batches.held_out(8)]
    return sum(losses) / len(losses)


def kept_bytes(state: object) -> int:
    """Bytes of the tensors in a weight's state; of a quantised one, of what it is made of."""
    if isinstance(state, dict):
        return sum(map(kept_bytes, state.values()))
    if hasattr(state, "__tensor_flatten__"):
        names, _ = state.__tensor_flatten__()
        return sum(kept_bytes(getattr(state, name)) for name in names)
    return state.nbytes if isinstance(state, Tensor) else 0


def print_table(runs: dict[str, Result], seeds: list[int]) -> None:
    """A row a run; differences are to float32 from the same first weights, its own to its first."""
    print(
        f"{'run':48} {'last loss':>9} {'diff':>8} {'held out':>9} {'diff':>8} "
        f"{'weight B':>8} {'state B':>8} {'seconds':>8}"
    )
    for name, run in runs.items():
        case, _, seed = name.partition(", seed ")
        first = runs[f"{REFERENCE}, seed {seeds[0] if case == REFERENCE else seed}"]
        print(
            f"{CASES[case].title:48} {run['last_loss']:9.4f} "
            f"{run['last_loss'] - first['last_loss']:+8.4f} {run['last_held_out']:9.4f} "
            f"{run['last_held_out'] - first['last_held_out']:+8.4f} "
            f"{run['weight_bytes_per_parameter']:8.2f} {run['state_bytes_per_parameter']:8.2f} "
            f"{run['seconds']:8.0f}  {name}"
        )


def draw(runs: dict[str, Result], said: dict[str, Any], arguments: argparse.Namespace) -> None:
    """All curves, and how far each is from the reference."""
    drawn = f", seed {arguments.seeds[0]}"
    others = [f"{REFERENCE}, seed {seed}" for seed in arguments.seeds[1:]]
    count = next(iter(runs.values()))["parameters"] / 1e6
    of_first = {name: run["losses"] for name, run in runs.items() if name.endswith(drawn)}
    draw_losses(
        {CASES[name.removesuffix(drawn)].title: each for name, each in of_first.items()},
        arguments.out / "low_bit_states.png",
        "Training with low-bit optimizer states: the loss against float32 AdamW's",
        f"{arguments.model}, {count:.1f} million parameters, learning rate {arguments.lr:g}, "
        f"{said['machine']}",
        chance=[runs[name]["losses"] for name in others],
        window=LAST,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--model", default="decoder-2m", choices=MODELS)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="0,1,2", help="of float32's first weights")
    parser.add_argument("--every-seed", action="store_true", help="in every case, not the first")
    parser.add_argument("--lr", type=float, default=1e-3, help="the largest of the schedule")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--policy", default="round-robin", help="a streamed one")
    parser.add_argument("--updates", default="host", choices=("host", "device"))
    parser.add_argument("--memory", help="of the device, as in 24GiB")
    arguments = parser.parse_args()
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.cases = arguments.cases.split(",")
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"--cases: no case {name}; there are {', '.join(CASES)}")
    return arguments


def machine(device: str) -> str:
    """The GPU, or the processor and how many cores of it there are."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Train every case, then the table and the picture."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    said = about(machine=machine(arguments.device), torchao=version("torchao"))
    batches = TextBatches(load_tokens("python-stdlib"), arguments.batch, arguments.sequence, seed=0)
    wanted = [(REFERENCE, seed) for seed in arguments.seeds]
    seeds = arguments.seeds if arguments.every_seed else arguments.seeds[:1]
    wanted += [(name, seed) for seed in seeds for name in arguments.cases if name != REFERENCE]
    runs: dict[str, Result] = {}
    for name, seed in wanted:
        result = train(CASES[name], seed, batches, arguments)
        runs[f"{name}, seed {seed}"] = result
        print(f"{name}, seed {seed}: {result['last_loss']:.4f}", flush=True)
        settings = {name: value for name, value in vars(arguments).items() if name != "out"}
        report = {"about": said, "settings": settings, "runs": runs}
        (arguments.out / "low_bit_states.json").write_text(json.dumps(report))
    print_table(runs, arguments.seeds)
    draw(runs, said, arguments)


if __name__ == "__main__":
    main()
