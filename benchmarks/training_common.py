"""What all systems of `training.py` share: the model, its weights, the batches and the clock."""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roundel.executor.decoder import Block, decoder_layers
from roundel.executor.places import count_peaks_anew
from roundel.executor.presets import PRESETS
from roundel.executor.sizes import parse_bytes

Result = dict[str, Any]
Step = Callable[[Tensor, Tensor], float]
"""One step on inputs and targets; its loss."""

WARM_UP = 2
"""Steps before those that count."""


def devices_of(arguments: argparse.Namespace) -> list[torch.device]:
    """The devices that the systems run on; the first one is that of `plain`."""
    return [torch.device(name) for name in arguments.devices.split(",")]


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """The dtype that everybody computes in."""
    dtype = getattr(torch, arguments.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def drawn_layers(arguments: argparse.Namespace, draw_on: torch.device) -> Iterator[nn.Module]:
    """The model's layers one by one in float32, with the same weights every time.

    draw_on: a GPU is quicker, and draws other numbers than the CPU.
    """
    torch.manual_seed(0)
    preset = PRESETS[arguments.model]
    layers = decoder_layers(
        preset.shape,
        rotary_base=preset.rotary_base,
        device="meta",
        dtype=torch.float32,
        head_in_loss=arguments.head_in_loss,
    )
    drawn = torch.Generator(device=draw_on).manual_seed(0)
    for layer in layers:
        layer.to_empty(device=draw_on)
        for part in layer.parameters():
            with torch.no_grad():
                part.fill_(1.0) if part.ndim == 1 else part.normal_(std=0.02, generator=drawn)
        yield layer


def make_layers(
    arguments: argparse.Namespace,
    device: torch.device | str,
    dtype: torch.dtype,
    draw_on: torch.device | None = None,
    only: range | None = None,
) -> list[nn.Module]:
    """The model on `device`. draw_on: None is the first device. only: so numbered layers."""
    draw_on = draw_on or devices_of(arguments)[0]
    layers = [
        layer.to(device, dtype)
        for number, layer in enumerate(drawn_layers(arguments, draw_on))
        if only is None or number in only
    ]
    if draw_on.type == "cuda":
        torch.cuda.empty_cache()
    return layers


def run_layer(layer: nn.Module, value: Any) -> Any:
    """A layer's output; of a block only the input is kept for backward."""
    if isinstance(layer, Block):
        return checkpoint(layer, value, use_reentrant=False)
    return layer(value)


def batches(arguments: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Two batches of random tokens that take turns: the loss can fall."""
    numbers = torch.Generator().manual_seed(1)
    size = (arguments.microbatches * arguments.sequences, arguments.sequence + 1)
    vocabulary = PRESETS[arguments.model].shape.vocabulary
    made = [torch.randint(vocabulary, size, generator=numbers) for _ in range(2)]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in made]


def wait_for_gpu() -> None:
    """Until the current GPU has done what it was given; nothing where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(
    step: Step, arguments: argparse.Namespace, wait: Callable[[], None] = wait_for_gpu
) -> Result:
    """Losses, and the mean time of the steps after two to warm up. wait: until all is done.

    Steps follow each other as in a training: nobody waits for all of one before the next.
    """
    data, losses, times = batches(arguments), [], []
    for number in range(arguments.steps + WARM_UP):
        if number == WARM_UP:
            wait()
            count_peaks_anew(devices_of(arguments))  # A first step may also measure the layers.
        times.append(time.perf_counter())
        losses.append(step(*data[number % 2]))
    wait()
    times.append(time.perf_counter())
    seconds = (times[-1] - times[WARM_UP]) / arguments.steps
    return {
        "losses": losses,
        "step_s": [end - start for start, end in pairwise(times)],
        "mean_step_s": seconds,
        "tokens_per_s": data[0][0].numel() / seconds,
    }


def cap_memory(arguments: argparse.Namespace, device: torch.device) -> None:
    """No more GPU memory than `--memory` for this process."""
    limit = parse_bytes(arguments.memory)
    if device.type == "cuda" and limit:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process had allocated there; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
