"""torch.distributed.pipelining: a stage a GPU, all resident, fused AdamW, blocks checkpointed.

Weights and AdamW's states have the dtype that is computed in, and no cap holds, as in `plain`.
"""

import argparse
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from training_common import Result, devices_of, dtype_of, make_layers, run_layer, timed

from roundel import InputError
from roundel.executor.head_loss import Projected
from roundel.executor.presets import PRESETS
from roundel.executor.token_loss import token_loss
from roundel.policies.balance import balanced_cut
from roundel.traces.costs import block_work, head_work

from .ranks import run_ranks, wait_for_all

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
}


def train(name: str, arguments: argparse.Namespace) -> Result:
    """Trains by the schedule of this name."""
    if len(devices_of(arguments)) < 2:
        raise InputError("needs at least two devices")
    cut = cut_of(arguments)
    return {**run_ranks(partial(_train, name, cut), arguments, capped=False), "cut": cut}


def cut_of(arguments: argparse.Namespace) -> tuple[int, ...]:
    """Layers per stage, embedding and head among them: `--cut`, or even shares of the FLOPs.

    A block's forward is counted twice, as it is recomputed. Raises InputError for a cut that does
    not fit.
    """
    shape, stages = PRESETS[arguments.model].shape, len(devices_of(arguments))
    cut: tuple[int, ...] | None = arguments.cut
    if cut is None:
        tokens = arguments.sequences * arguments.sequence
        block = block_work(shape, arguments.sequence, arguments.sequences)
        head = head_work(shape, tokens)
        flops = [2 * block.forward_flops + block.backward_flops] * shape.layers
        # The embedding only looks up; a 1 keeps it with the first block.
        costs = [1, *map(round, flops), round(head.forward_flops + head.backward_flops)]
        return balanced_cut(costs, range(stages))
    layers = shape.layers + 2
    if len(cut) != stages or sum(cut) != layers or min(cut) < 1:
        raise InputError(f"--cut: must be {stages} numbers from 1 on that add up to {layers}")
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
    device = devices_of(arguments)[rank]
    count: int = arguments.microbatches
    bounds = [0, *accumulate(cut)]
    layers = make_layers(
        arguments, device, dtype_of(arguments), device, range(bounds[rank], bounds[rank + 1])
    )
    first, last = rank == 0, rank == len(cut) - 1

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        head: Any = layers[-1]
        made = Projected(output, head.project.weight) if arguments.head_in_loss else output
        return token_loss(made, target) / count

    schedule = SCHEDULES[name](
        PipelineStage(_Stage(layers), rank, len(cut), device),
        n_microbatches=count,
        loss_fn=loss_of,
        scale_grads=False,
    )
    parameters = [each for layer in layers for each in layer.parameters()]
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

    assert dist.get_world_size() == len(cut)
    return timed(step, arguments, wait_for_all)
