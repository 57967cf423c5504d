"""Stages: a model's layers in contiguous ranges, each on one device, and the ops that run them."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import ClassVar, Protocol, get_args

from ..traces.errors import InputError
from .balance import balanced_cut
from .op import Op
from .plan import Place, Plan, Recompute
from .work import Work, whole_number

Stage = tuple[int, int]
"""The layers [first, stop) of a stage."""


class Fixed(Protocol):
    """A policy whose stages stay on their devices. Some also have a `weight_share`.

    recompute_layers: so many layers are recomputed at a time, right before their backward, last
        layers first, from inputs that their forward has kept, as with PyTorch's checkpoints. So no
        other layers' saved tensors need room, but those inputs do: less in all for 1F1B, more where
        many microbatches wait (GPipe) or what is saved stays until W. Each time what only makes the
        last output is left out. None: all layers of a stage at once, from the stage's input.
    """

    name: ClassVar[str]

    @property
    def partition(self) -> tuple[int, ...] | None: ...
    @property
    def recompute(self) -> Recompute: ...
    @property
    def optimizer_on(self) -> Place: ...
    @property
    def clip(self) -> bool: ...
    @property
    def recompute_layers(self) -> int | None: ...


def looped_homes(policy: str, devices: int, chunks: int) -> list[int]:
    """The device of each stage when stage `s` runs on device `s` modulo `devices`."""
    if chunks < 1:
        raise InputError(f"{policy}: chunks: must be at least 1, got {chunks}")
    return [*range(devices)] * chunks


def cut_stages(
    policy: Fixed, work: Work, homes: Sequence[int], kinds: str, spares_last: bool = False
) -> list[Stage]:
    """The stages of `work`, one for each entry of `homes`, the device that runs it.

    The policy's `partition` counts their layers; None takes the balanced cut for ops of `kinds`
    together. `spares_last`: in the last stage every backward is right behind its forward, so that
    it recomputes only what is not `needed`.
    Raises InputError, naming the policy, for a partition that does not fit the work.
    """
    partition, share = policy.partition, _weight_share(policy)
    layer_ns = _layer_ns(policy.name, work, kinds, share)
    if "R" in kinds and policy.recompute_layers == 1:
        layer_ns = [whole - spared for whole, spared in zip(layer_ns, work.spared_ns, strict=True)]
    if partition is None:
        _check_enough_layers(policy.name, work, len(homes))
        if spares_last and policy.recompute == "needed":
            last_ns = _layer_ns(policy.name, work, kinds.replace("R", ""), share)
            partition = _cut_with_other_last(layer_ns, last_ns, homes)
        else:
            partition = balanced_cut(layer_ns, homes)
    _check_partition(policy.name, work, partition, len(homes))
    return list(pairwise(accumulate(partition, initial=0)))


def resident_plan(policy: Fixed, devices: Iterable[Sequence[Op]]) -> Plan:
    """The plan of a policy whose stages stay on their devices, which run these ops."""
    size = policy.recompute_layers
    if size is not None:
        whole_number(f"{policy.name}: recompute_layers", size)
        if policy.recompute == "none":
            raise InputError(
                f"{policy.name}: recompute_layers does nothing without recompute; "
                "give recompute early, late or needed, too"
            )
    return Plan(
        tuple(_in_parts(_where_needed(ops, policy.recompute), size) for ops in devices),
        late_recompute=policy.recompute == "late",
        optimizer_on=policy.optimizer_on,
        clip=policy.clip,
        weight_share=_weight_share(policy),
    )


def backward_kinds(policy: str, recompute: Recompute, backward: str) -> str:
    """The kinds that make up one backward: `backward`, after an R where there is recompute."""
    if recompute not in get_args(Recompute):
        known = "none, early, late or needed"
        raise InputError(f"{policy}: recompute: must be {known}, got {recompute!r}")
    return backward if recompute == "none" else "R" + backward


def _where_needed(ops: Sequence[Op], recompute: Recompute) -> tuple[Op, ...]:
    """A device's ops; of `needed` recomputes those that do not come right behind their forward.

    What such a forward saves is still there, and takes no more room than the recompute's.
    """
    if recompute != "needed":
        return tuple(ops)
    before = [None, *ops[:-1]]
    return tuple(
        op
        for op, last in zip(ops, before, strict=True)
        if not (op.kind == "R" and last == op._replace(kind="F"))
    )


def _in_parts(ops: Sequence[Op], size: int | None) -> tuple[Op, ...]:
    """A device's ops; each recompute and the backward behind it `size` layers at a time, and its W.

    A recompute's backward comes right behind it in every policy.
    """
    if size is None:
        return tuple(ops)
    result, left = [], list(reversed(ops))
    again = {op._replace(kind="W") for op in ops if op.kind == "R"}
    while left:
        op = left.pop()
        together = [op, left.pop()] if op.kind == "R" else [op]
        step = size if op.kind == "R" or op in again else op.stop - op.first
        for stop in range(op.stop, op.first, -step):
            first = max(op.first, stop - step)
            result += [each._replace(first=first, stop=stop) for each in together]
    return tuple(result)


def ops(kind: str, stage: Stage, microbatches: Iterable[int]) -> list[Op]:
    """An op of `kind` on `stage` for each microbatch."""
    first, stop = stage
    return [Op(kind, first, stop, microbatch) for microbatch in microbatches]


def weave(*columns: Sequence[Op | None]) -> list[Op]:
    """The ops of columns, row by row; None, and a column that is shorter, leave a gap."""
    return [op for row in zip_longest(*columns) for op in row if op is not None]


def _weight_share(policy: Fixed) -> float | None:
    return getattr(policy, "weight_share", None)


def _cut_with_other_last(
    layer_ns: list[int], last_ns: list[int], homes: Sequence[int]
) -> tuple[int, ...]:
    """The balanced cut, where layers take other times in the last stage: as many as it will have.

    Of all guesses at their number the one whose cut has the fastest slowest device.
    """

    def slowest(cut: tuple[int, ...]) -> int:
        load = [0] * (max(homes) + 1)
        bounds = list(accumulate(cut, initial=0))
        for home, (first, stop) in zip(homes[:-1], pairwise(bounds), strict=False):
            load[home] += sum(layer_ns[first:stop])
        load[homes[-1]] += sum(last_ns[bounds[-2] :])
        return max(load)

    guesses = range(len(layer_ns) - len(homes) + 2)
    firsts = (len(layer_ns) - count for count in guesses)
    cuts = (balanced_cut(layer_ns[:first] + last_ns[first:], homes) for first in firsts)
    return min(cuts, key=slowest)


def _layer_ns(policy: str, work: Work, kinds: str, weight_share: float | None) -> list[int]:
    if weight_share is not None and not 0 <= weight_share <= 1:
        raise InputError(f"{policy}: weight_share: must be from 0 to 1, got {weight_share}")
    return work.together_ns(kinds, weight_share)


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
