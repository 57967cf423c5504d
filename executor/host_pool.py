"""HostPool: host memory for tensors that wait there, used again when they have gone."""

import threading
from collections import defaultdict, deque

import torch
from torch import Tensor

from .host_memory import host_bytes
from .streams import Mark
from .values import Value, copy_each, map_tensors, read_on_current_stream, tensors_of


class HostPool:
    """Copies values to the host, into memory of exactly their size that is kept from step to step.

    pin: memory that GPUs copy to and from.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._free: dict[int, deque[tuple[Tensor, Mark]]] = defaultdict(deque)
        self._used: dict[int, Tensor] = {}
        self._wanted: set[int] = set()
        self._lock = threading.Lock()

    def copy(self, value: Value) -> Value:
        """A copy on the host, made on the current stream, which is the pool's again in the end."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def place(tensor: Tensor) -> Tensor:
            if not tensor.numel():
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            read_on_current_stream(tensor)
            target = self._place(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
            pairs.append((target, tensor.detach()))
            return target

        places = map_tensors(place, value)
        copy_each(pairs)
        return places

    def _place(self, nbytes: int) -> Tensor:
        with self._lock:
            self._wanted.add(nbytes)
            free = self._free[nbytes]
            flat, mark = free.popleft() if free else (None, None)
        if mark is not None:
            mark.block()
        flat = host_bytes(nbytes, self._pin) if flat is None else flat
        self._used[flat.data_ptr()] = flat
        return flat

    def give_back(self, value: Value, mark: Mark) -> None:
        """A value that `copy` made is not needed any more once `mark` has been reached."""
        for tensor in tensors_of(value):
            flat = self._used.pop(tensor.data_ptr(), None)
            if flat is not None:
                with self._lock:
                    self._free[len(flat)].append((flat, mark))

    def tidy(self) -> None:
        """Let go of the sizes that were not asked for in the step that began when this was called
        before."""
        with self._lock:
            for nbytes in self._free.keys() - self._wanted:
                for _, mark in self._free.pop(nbytes):
                    mark.block()
            self._wanted.clear()
