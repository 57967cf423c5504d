"""ZB-V, zero bubble with the memory of 1F1B (arXiv 2405.15362; 2401.10241, section 6)."""

from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

from .op import Op
from .plan import Place, Plan, Recompute
from .stages import Stage, backward_kinds, cut_stages, ops, resident_plan
from .work import Work

Value = tuple[str, int, int]
"""A tensor at the bound before a layer, of a microbatch: `F` the activation, `I` its gradient."""


@dataclass(frozen=True)
class ZBV:
    """Two stages a device, placed in a V: device r of p runs stages r and 2 p - 1 - r.

    From 2 p - 1 microbatches on it is the schedule of the paper, without a wait between a
    device's first and last op when F, I and W take equally long. With fewer, F and I keep that
    order, and a W runs where they would have to wait.

    partition: layers per stage, first stage first, head included. None: the balanced cut.
    recompute: `early` runs a recompute as soon as it can, `late` once the gradient is there,
        `needed` as `early`, but none right behind its forward.
    recompute_layers: so many layers at a time; None: all of a stage. See `stages.Fixed`.
    weight_share: the part of backward that W takes where the trace does not know it.
    """

    name: ClassVar[str] = "zb-v"

    partition: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    optimizer_on: Place = "device"
    clip: bool = False
    weight_share: float | None = None
    recompute_layers: int | None = None

    def plan(self, work: Work, step: int) -> Plan:
        """The same plan for every step. Raises InputError when partition or trace do not fit."""
        kinds = backward_kinds(self.name, self.recompute, "I")
        homes = [*range(work.devices), *reversed(range(work.devices))]
        stages = cut_stages(self, work, homes, f"F{kinds}W", spares_last=True)
        orders = _orders(stages, work.devices, work.microbatches)
        return resident_plan(self, (_with_recompute(order, kinds) for order in orders))

    def peak_activations(self, devices: int, microbatches: int, rank: int) -> int:
        """The most microbatches of a stage that device `rank` holds at once, until their W."""
        return 2 * min(microbatches, devices)


def _orders(stages: list[Stage], devices: int, microbatches: int) -> list[list[Op]]:
    enough = max(microbatches, 2 * devices - 1)
    orders = [
        _order(_letters(devices, rank, enough), stages[rank], stages[-1 - rank], enough)
        for rank in range(devices)
    ]
    if microbatches == enough:
        return orders
    fewer = [[op for op in order if op.microbatch < microbatches] for order in orders]
    return _fill(fewer, layers=stages[-1][1], microbatches=microbatches)


def _letters(devices: int, rank: int, microbatches: int) -> str:
    """The order as letters: upper case for a device's first stage, lower case for its second."""
    later = devices - rank
    warm_up = "F" * (2 * later - 1) + "fF" * rank + "fiw" * later
    steady = "FIWfiw" * (microbatches - 2 * devices + rank + 1) + "IWfiw" * (later - 1)
    return warm_up + steady + "Ii" * rank + "IW" * later + "w" * rank + "W" * rank


def _order(letters: str, upper: Stage, lower: Stage, microbatches: int) -> list[Op]:
    every = range(microbatches)
    runs = {letter: iter(ops(letter, upper, every)) for letter in "FIW"}
    runs |= {letter.lower(): iter(ops(letter, lower, every)) for letter in "FIW"}
    return [next(runs[letter]) for letter in letters]


def _with_recompute(order: list[Op], kinds: str) -> tuple[Op, ...]:
    if kinds == "I":
        return tuple(order)
    pairs = ((op._replace(kind="R") if op.kind == "I" else None, op) for op in order)
    return tuple(op for pair in pairs for op in pair if op is not None)


def _fill(orders: list[list[Op]], layers: int, microbatches: int) -> list[list[Op]]:
    """`orders` with each W where its device would else wait, were all ops equally long."""
    devices = [_Device(deque(op for op in order if op.kind != "W")) for order in orders]
    there = {
        value
        for number in range(microbatches)
        for value in (("F", 0, number), ("I", layers, number))
    }
    while any(device.ahead or device.weights for device in devices):
        ran = [device.take_turn(there, most=2 * len(devices)) for device in devices]
        there.update(_given(op) for op in ran if op is not None)
    return [device.taken for device in devices]


@dataclass
class _Device:
    """A device of `_fill`: the F and I still to run, in order, and the W that are possible."""

    ahead: deque[Op]
    weights: deque[Op] = field(default_factory=deque)
    taken: list[Op] = field(default_factory=list)
    held: int = 0

    def take_turn(self, there: set[Value], most: int) -> Op | None:
        """The op that runs now: the next F or I, else a W, else None.

        A forward waits for a W where the device would hold more than `most` activations.
        """
        if self._can_go_on(there, most):
            op = self.ahead.popleft()
        elif self.weights:
            op = self.weights.popleft()
        else:
            return None
        self.held += (op.kind == "F") - (op.kind == "W")
        if op.kind == "I":
            self.weights.append(op._replace(kind="W"))
        self.taken.append(op)
        return op

    def _can_go_on(self, there: set[Value], most: int) -> bool:
        if not self.ahead:
            return False
        op = self.ahead[0]
        return _needed(op) in there and (op.kind != "F" or self.held < most)


def _needed(op: Op) -> Value:
    return (op.kind, op.first if op.kind == "F" else op.stop, op.microbatch)


def _given(op: Op) -> Value:
    return (op.kind, op.stop if op.kind == "F" else op.first, op.microbatch)
