"""Plain PyTorch: all resident on one device, fused AdamW on weights of the dtype, no cap.

Blocks are checkpointed. It is the limit: with enough memory nobody needs more than this.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from training_common import (
    Result,
    devices_of,
    dtype_of,
    make_layers,
    peak_bytes,
    run_layer,
    timed,
    wait_for_gpu,
)

from roundel.executor.token_loss import token_loss


def plain(arguments: argparse.Namespace, wait: Callable[[], None] = wait_for_gpu) -> Result:
    """Trains on the first device, one microbatch after the other. wait: until all is done."""
    device, count = devices_of(arguments)[0], arguments.microbatches
    layers = make_layers(arguments, device, dtype_of(arguments))
    parameters = [each for layer in layers for each in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> float:
        total = torch.zeros((), device=device)
        for x, y in zip(inputs.chunk(count), targets.chunk(count), strict=True):
            value = x.to(device, non_blocking=True)
            for layer in layers:
                value = run_layer(layer, value)
            loss = token_loss(value, y.to(device, non_blocking=True))
            (loss / count).backward()
            total += loss.detach() / count
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return {**timed(step, arguments, wait), "peak_allocated_bytes": peak_bytes(device)}
