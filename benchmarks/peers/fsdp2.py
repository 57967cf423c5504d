"""FSDP2 with CPU offload: float32 masters and AdamW on the host, a rank for each device.

Every block, the embedding and the head with its loss are sharded by themselves; blocks are
checkpointed. Each rank takes its share of the sequences, a microbatch at a time. Gradients come to
the host after each microbatch; with `sync="last"` they stay on the GPU until the last one, which
needs memory for all of them there, and sends them once.
"""

import argparse
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from training_common import Result, devices_of, drawn_layers, dtype_of, run_layer, timed

from roundel import InputError
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss

from .ranks import run_ranks, wait_for_all

Sync = Literal["each", "last"]


def train(sync: Sync, arguments: argparse.Namespace) -> Result:
    """Trains with `fully_shard`; sync: the microbatches whose gradients go to the host."""
    sequences, ranks = arguments.microbatches * arguments.sequences, len(devices_of(arguments))
    if sequences % ranks:
        raise InputError(f"{sequences} sequences cannot be shared evenly by {ranks} devices")
    return run_ranks(partial(_train, sync), arguments, capped=True)


class _Inside(nn.Module):
    """A layer whose checkpoint is inside its sharding, so that its weights are gathered once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Any:
        return run_layer(self.layer, value)


class _HeadLoss(nn.Module):
    """Head and loss in one: the loss may need the head's weights."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, value: Tensor, targets: Tensor) -> Tensor:
        return token_loss(self.head(value), targets)


class _Model(nn.Module):
    def __init__(self, body: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.ModuleList(body), head

    def forward(self, value: Tensor, targets: Tensor) -> Any:
        for layer in self.body:
            value = layer(value)
        return self.head(value, targets)


def _sharded(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The model, each layer sharded over all ranks and put on the host as soon as it is drawn."""
    dtype = dtype_of(arguments)
    shard: Any = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(None if dtype == torch.float32 else dtype),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    )
    layers = drawn_layers(arguments, device)
    body = [shard(_Inside(next(layers))) for _ in range(PRESETS[arguments.model].shape.layers + 1)]
    # Backward needs the head's weights first; they stay for it.
    head = shard(_HeadLoss(next(layers)), reshard_after_forward=False)
    return shard(_Model(body, head))


def _train(sync: Sync, rank: int, arguments: argparse.Namespace) -> Result:
    device, ranks = devices_of(arguments)[rank], dist.get_world_size()
    model = _sharded(arguments, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> float:
        mine = [each.chunk(ranks)[rank].to(device) for each in (inputs, targets)]
        parts = list(zip(*(torch.split(each, arguments.sequences) for each in mine), strict=True))
        total = torch.zeros((), device=device)
        for number, (x, y) in enumerate(parts, start=1):
            model.set_requires_gradient_sync(sync == "each" or number == len(parts))
            loss = model(x, y) * (len(x) / len(mine[0]))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total) / ranks

    return timed(step, arguments, wait_for_all)
