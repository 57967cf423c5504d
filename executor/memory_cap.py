"""MemoryCap: what a trainer may take of its GPUs' memory."""

from collections.abc import Sequence

import torch

from .places import gpus_of


class MemoryCap:
    """Lets this process have so many bytes for each device, 0 being no limit, until it is lifted.

    Several virtual devices on one GPU have as many times as much there.
    """

    def __init__(self, devices: Sequence[torch.device], limit_bytes: int) -> None:
        self._devices, self._limit_bytes = devices, limit_bytes
        self._shares_before: dict[torch.device, float] = {}

    def set(self) -> None:
        """Enforce the limit, on memory that nobody has any more."""
        for device in gpus_of(self._devices):
            # What measuring and earlier trainers took is not for this one's steps; cuBLAS keeps
            # some for every stream that it has been used on.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            if self._limit_bytes:
                self._shares_before[device] = torch.cuda.get_per_process_memory_fraction(device)
                whole = torch.cuda.get_device_properties(device).total_memory
                share = self._limit_bytes * self._devices.count(device) / whole
                torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)

    def lift(self) -> None:
        """Allow what was allowed before."""
        while self._shares_before:
            device, share = self._shares_before.popitem()
            torch.cuda.set_per_process_memory_fraction(share, device)
