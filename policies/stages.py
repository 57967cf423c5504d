"""Stages: a model's layers in contiguous ranges, each on one device, and the ops that run them."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, zip_longest

from ..traces.errors import InputError
from .balance import balanced_cut
from .op import Op
from .plan import Recompute
from .work import Work

Stage = tuple[int, int]
"""The layers [first, stop) of a stage."""


def looped_homes(policy: str, devices: int, chunks: int) -> list[int]:
    """The device of each stage when stage `s` runs on device `s` modulo `devices`."""
    if chunks < 1:
        raise InputError(f"{policy}: chunks: must be at least 1, got {chunks}")
    return [*range(devices)] * chunks


def cut_stages(
    policy: str,
    work: Work,
    partition: tuple[int, ...] | None,
    homes: Sequence[int],
    kinds: str,
    weight_share: float | None = None,
) -> list[Stage]:
    """The stages of `work`, one for each entry of `homes`, the device that runs it.

    `partition` counts their layers; None takes the balanced cut for ops of `kinds` together.
    Raises InputError, naming `policy`, for a partition that does not fit the work.
    """
    layer_ns = _layer_ns(policy, work, kinds, weight_share)
    if partition is None:
        _check_enough_layers(policy, work, len(homes))
        partition = balanced_cut(layer_ns, homes)
    _check_partition(policy, work, partition, len(homes))
    return list(pairwise(accumulate(partition, initial=0)))


def backward_kinds(policy: str, recompute: Recompute, backward: str) -> str:
    """The kinds that make up one backward: `backward`, after an R where there is recompute."""
    if recompute not in ("none", "early", "late"):
        raise InputError(f"{policy}: recompute: must be none, early or late, got {recompute!r}")
    return backward if recompute == "none" else "R" + backward


def ops(kind: str, stage: Stage, microbatches: Iterable[int]) -> list[Op]:
    """An op of `kind` on `stage` for each microbatch."""
    first, stop = stage
    return [Op(kind, first, stop, microbatch) for microbatch in microbatches]


def weave(*columns: Sequence[Op | None]) -> list[Op]:
    """The ops of columns, row by row; None, and a column that is shorter, leave a gap."""
    return [op for row in zip_longest(*columns) for op in row if op is not None]


def _layer_ns(policy: str, work: Work, kinds: str, weight_share: float | None) -> list[int]:
    if weight_share is not None and not 0 <= weight_share <= 1:
        raise InputError(f"{policy}: weight_share: must be from 0 to 1, got {weight_share}")
    times = [work.layer_ns(kind, weight_share) for kind in kinds]
    return [sum(layer) for layer in zip(*times, strict=True)]


def _check_enough_layers(policy: str, work: Work, stages: int) -> None:
    if stages > work.layers:
        raise InputError(
            f"{policy}: {_stages(stages, work)} need at least as many layers, "
            f"the trace has {work.layers} (head included); use fewer devices or chunks"
        )


def _check_partition(policy: str, work: Work, partition: tuple[int, ...], stages: int) -> None:
    where = f"{policy}: partition {' '.join(map(str, partition))}"
    if any(count < 1 for count in partition):
        raise InputError(f"{where}: every stage must have at least one layer")
    if len(partition) != stages:
        raise InputError(
            f"{where}: has {len(partition)} stages, it must have {_stages(stages, work)}"
        )
    if sum(partition) != work.layers:
        raise InputError(
            f"{where}: has {sum(partition)} layers, the trace {work.layers} (head included)"
        )


def _stages(stages: int, work: Work) -> str:
    return f"{stages} stages ({work.devices} devices x {stages // work.devices} a device)"
