"""RoundPipe (arXiv 2604.27085), where it is installed: pip install roundpipe==0.1.1.

Written from its published documentation and signatures alone, never from its sources: its license
is LGPL. Weights on its host copies have the dtype that is computed in and AdamW works on float32
ones, which begin at those rounded weights. AdamW is its own `optim.Adam`, decoupled, and its plan
is the one that it tunes by itself. Asynchronous steps train with weights one step old.
"""

import argparse
import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from training_common import Result, cap_memory, devices_of, dtype_of, make_layers, peak_bytes, timed

from roundel import InputError
from roundel.executor.token_loss import token_loss

WEIGHT_DECAY = 0.01
"""What torch.optim.AdamW has where nothing is said."""


def train(updates: Literal["async", "sync"], arguments: argparse.Namespace) -> Result:
    """Trains in this one process; updates: `async` ones run beside the next step."""
    _check(arguments)
    arguments = _only_visible(arguments)
    devices = devices_of(arguments)
    count: int = arguments.microbatches
    for device in devices:
        cap_memory(arguments, device)
    # It looks for GPUs when it is imported.
    package: Any = import_module("roundpipe")

    model = package.RoundPipe(
        nn.Sequential(*make_layers(arguments, "cpu", dtype_of(arguments))),
        optim_dtype=torch.float32,
        model_run_config=package.RoundPipeRunConfig(num_microbatch=count),
    )
    optimizer = package.optim.Adam(
        model.optim_parameters(),
        lr=arguments.lr,
        weight_decay=WEIGHT_DECAY,
        decoupled_weight_decay=True,
    )

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return token_loss(output, target.to(output.device, non_blocking=True)) / count

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = model.forward_backward(input_args=(inputs,), label=targets, loss_fn=loss_of)
        model.step(update, is_async=updates == "async")
        return float(loss)

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    result = timed(step, arguments, wait)
    model.synchronize()
    return {**result, "peak_allocated_bytes": max(peak_bytes(each) or 0 for each in devices)}


def _check(arguments: argparse.Namespace) -> None:
    """Raises InputError where it cannot run."""
    if find_spec("roundpipe") is None:
        raise InputError("not installed; pip install roundpipe==0.1.1")
    if any(device.type != "cuda" for device in devices_of(arguments)):
        raise InputError("needs GPUs")
    if arguments.head_in_loss:
        raise InputError("cannot leave the head's product to the loss; drop --head-in-loss")


def _only_visible(arguments: argparse.Namespace) -> argparse.Namespace:
    """It takes all GPUs that are visible: show it those of `--devices`, numbered from 0.

    To be called before CUDA is used.
    """
    numbers = [device.index or 0 for device in devices_of(arguments)]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(max(numbers) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in numbers)
    renumbered = ",".join(f"cuda:{number}" for number in range(len(numbers)))
    return argparse.Namespace(**{**vars(arguments), "devices": renumbered})
