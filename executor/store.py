"""Store: what lives in which memory, by the program's buffer table."""

import threading
from typing import Any, NamedTuple

import torch

from ..policies.program import LABELS, Program
from ..traces.timeline import KIND_CODE
from .values import tensors_of


class Key(NamedTuple):
    """A buffer's name: what it holds, in which memory, of which layer and microbatch.

    `fetched`: a copy that was on the host in between.
    """

    label: str
    pool: int
    layer: int
    microbatch: int
    fetched: bool = False


_KEPT = ("saved activations", "boundary activations", "boundary gradients")


class Lifetimes(NamedTuple):
    """How many tasks use each key, and the keys that each task uses."""

    uses: dict[Key, int]
    ends: dict[int, list[Key]]

    @classmethod
    def of(cls, program: Program) -> "Lifetimes":
        """By the program's buffer table."""
        buffers = program.buffers
        fetch = KIND_CODE["fetch"]
        keys: dict[int, Key] = {}
        for buffer, (label, alloc) in enumerate(
            zip(buffers.label.tolist(), buffers.alloc.tolist(), strict=True)
        ):
            if LABELS[label] in _KEPT:
                keys[buffer] = Key(
                    LABELS[label],
                    int(buffers.pool[buffer]),
                    int(buffers.layer[buffer]),
                    int(program.microbatch[alloc]),
                    bool(program.kind[alloc] == fetch),
                )
        left: dict[Key, int] = dict.fromkeys(keys.values(), 0)
        ends: dict[int, list[Key]] = {}
        for buffer, task in zip(
            buffers.use_buffer.tolist(), buffers.use_task.tolist(), strict=True
        ):
            if buffer in keys:
                left[keys[buffer]] += 1
                ends.setdefault(task, []).append(keys[buffer])
        return cls(left, ends)


class Store:
    """Values by key, each let go when the last task that uses its buffer is done.

    `poison`: overwrite freed copies with NaN, so that a use after the end shows.
    """

    def __init__(self, lifetimes: Lifetimes, poison: bool = False) -> None:
        self._values: dict[Key, Any] = {}
        self._owned: set[Key] = set()
        self._poison = poison
        self._lock = threading.Lock()
        self._left, self._ends = dict(lifetimes.uses), lifetimes.ends

    def put(self, key: Key, value: Any, owned: bool = False) -> None:
        """Keep a value. `owned`: nothing else shares its memory."""
        with self._lock:
            assert key not in self._values, f"{key} is there already"
            self._values[key] = value
            if owned:
                self._owned.add(key)

    def get(self, key: Key) -> Any:
        """The value of a key, which must be there."""
        return self._values[key]

    def end(self, task: int) -> list[tuple[Key, Any]]:
        """A task is done: let go of what it was the last to use, which is returned."""
        gone = []
        for key in self._ends.get(task, ()):
            with self._lock:
                self._left[key] -= 1
                if self._left[key]:
                    continue
                value = self._values.pop(key, None)
                owned = key in self._owned
                self._owned.discard(key)
            if self._poison and owned:
                poison(value)
            gone.append((key, value))
        return gone

    def clear(self) -> None:
        """Let go of everything."""
        self._values.clear()


@torch.no_grad()
def poison(value: Any) -> None:
    """Overwrite a value with NaN."""
    for tensor in tensors_of(value):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
