"""Plan: per device, the ops in order, and where weights, optimizer and activations live."""

import csv
import io
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, get_args

from ..traces.errors import InputError
from .op import Op
from .work import Work

Weights = Literal["resident", "streamed"]
Recompute = Literal["none", "early", "late", "needed"]
Optimizer = Literal["sync", "stale"]
Place = Literal["host", "device"]


_ALLOWED: dict[str, tuple[object, ...]] = {
    "late_recompute": (True, False),
    "weights": get_args(Weights),
    "optimizer": get_args(Optimizer),
    "optimizer_on": get_args(Place),
    "activations": get_args(Place),
    "clip": (True, False),
}


@dataclass(frozen=True)
class Plan:
    """The ops of one step, per device in order.

    late_recompute: an `R` waits for the gradient that its `B` needs; else only for its input.
    weights: `resident`, each layer on the one device that runs it; `streamed`, uploaded from the
        host for every visit (a run of ops of one device on the same layers, and before it any
        forwards of some of these layers at a time) and freed after it.
    optimizer: `sync`, the next step uses this step's update; `stale`, the one after it does.
    optimizer_on: where states live and updates run; for streamed weights and `device`, states
        pass through the device.
    activations: where boundary tensors wait for a recompute: on a device or on the host.
    clip: gradients are clipped by their global norm, so every update waits for all of them.
    weight_share: the part of backward that `W` takes where the trace does not know it.
    """

    devices: tuple[tuple[Op, ...], ...]
    late_recompute: bool = False
    weights: Weights = "resident"
    optimizer: Optimizer = "sync"
    optimizer_on: Place = "device"
    activations: Place = "device"
    clip: bool = False
    weight_share: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"plan: {name} must be one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )
        share = self.weight_share
        if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
            raise InputError(f"plan: weight_share must be from 0 to 1, got {share!r}")

    def check(self, work: Work) -> None:
        """Refuse a plan that misses or repeats work, breaks a dependency or can deadlock.

        Raises InputError naming the op.
        """
        from .check import check_plan

        check_plan(self, work)

    @property
    def outlasts_step(self) -> bool:
        """Whether some of a step goes on beside the next one, so that both need room."""
        passes_through = self.weights == "streamed" and self.optimizer_on == "device"
        return self.optimizer == "stale" or passes_through

    def without_ops(self) -> "Plan":
        """Only the rules of this plan: where things live and what waits for what."""
        return replace(self, devices=())

    def grid(self) -> str:
        """The plan as text: a column per device, a row per position."""
        columns = [[f"gpu{number}", *map(str, ops)] for number, ops in enumerate(self.devices)]
        widths = [max(map(len, column)) for column in columns]
        rows = zip_longest(*columns, fillvalue="")
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """The ops as CSV: a row per device, an op per cell."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [str(op) for op in ops] for ops in self.devices
        )
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, **knobs: object) -> "Plan":
        """The plan whose `to_csv` is `text`; `knobs` are the other fields. Raises InputError."""
        devices = []
        for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
            try:
                devices.append(tuple(Op.parse(cell) for cell in row if cell.strip()))
            except InputError as error:
                raise InputError(f"plan CSV, row {number}: {error}") from None
        return cls(tuple(devices), **knobs)  # type: ignore[arg-type]
