"""torch.distributed.pipelining: one stage a GPU, interleaved two, all resident, fused AdamW, blocks
checkpointed.

Weights and AdamW's states have the dtype that is computed in, and no cap holds, as in `plain`.
"""

import argparse
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from training_common import Result, devices_of, dtype_of, make_layers, run_layer, timed

from roundel import InputError
from roundel.executor.head_loss import Projected
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.policies.balance import balanced_cut
from roundel.traces.costs import block_work, head_work

from .ranks import run_ranks, wait_for_all

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
}


def train(name: str, arguments: argparse.Namespace) -> Result:
    """Trains by the schedule of this name."""
    if len(devices_of(arguments)) < 2:
        raise InputError("needs at least two devices")
    cut = cut_of(name, arguments)
    return {**run_ranks(partial(_train, name, cut), arguments, capped=False), "cut": cut}


def cut_of(name: str, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Layers per stage, embedding and head among them: `--cut` or, of two stages a device,
    `--interleaved-cut`; without it, even shares of the FLOPs.

    A block's forward is counted twice, as it is recomputed. Raises InputError for a cut that does
    not fit.
    """
    shape, devices = PRESETS[arguments.model].shape, len(devices_of(arguments))
    interleaved = name == "interleaved-1f1b"
    homes = [*range(devices)] * (2 if interleaved else 1)
    cut: tuple[int, ...] | None = arguments.interleaved_cut if interleaved else arguments.cut
    if cut is None:
        tokens = arguments.sequences * arguments.sequence
        block = block_work(shape, arguments.sequence, arguments.sequences)
        head = head_work(shape, tokens)
        flops = [2 * block.forward_flops + block.backward_flops] * shape.layers
        # The embedding only looks up; a 1 keeps it with the first block.
        costs = [1, *map(round, flops), round(head.forward_flops + head.backward_flops)]
        return balanced_cut(costs, homes)
    layers = shape.layers + 2
    if len(cut) != len(homes) or sum(cut) != layers or min(cut) < 1:
        option = "--interleaved-cut" if interleaved else "--cut"
        raise InputError(
            f"{option}: must be {len(homes)} numbers from 1 on that add up to {layers}"
        )
    return cut


class _Stage(nn.Module):
    """Layers in a row. Of a head that leaves its product to the loss, the hidden states."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, value: Any) -> Any:
        for layer in self.layers:
            value = run_layer(layer, value)
        return value.hidden if isinstance(value, Projected) else value


def _train(name: str, cut: tuple[int, ...], rank: int, arguments: argparse.Namespace) -> Result:
    device, ranks = devices_of(arguments)[rank], dist.get_world_size()
    count: int = arguments.microbatches
    bounds = [0, *accumulate(cut)]
    mine = range(rank, len(cut), ranks)
    held = [range(bounds[stage], bounds[stage + 1]) for stage in mine]
    stages = [
        _Stage(make_layers(arguments, device, dtype_of(arguments), device, layers))
        for layers in held
    ]
    first, last = rank == 0, rank == ranks - 1

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        head: Any = stages[-1].layers[-1]
        made = Projected(output, head.project.weight) if arguments.head_in_loss else output
        return token_loss(made, target) / count

    piped = [
        PipelineStage(stage, number, len(cut), device)
        for number, stage in zip(mine, stages, strict=True)
    ]
    schedule = SCHEDULES[name](
        piped if len(piped) > 1 else piped[0],
        n_microbatches=count,
        loss_fn=loss_of,
        scale_grads=False,
    )
    parameters = [each for stage in stages for each in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        value = (inputs.to(device, non_blocking=True),) if first else ()
        target = targets.to(device, non_blocking=True) if last else None
        # All logits of a step in one tensor would not fit; they are not asked for.
        schedule.step(*value, target=target, losses=losses, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).detach().sum()) if last else 0.0

    return timed(step, arguments, wait_for_all)
