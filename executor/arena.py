"""Arena: memory that torch's allocator takes in one piece, before steps ask for it bit by bit."""

import os
from collections.abc import Sequence
from contextlib import suppress

import torch

from .places import count_peaks_anew
from .streams import Stream

MORE = 0.1
"""What an allocator takes beside what it gives, as a share of that."""


def arena_bytes(peak: int, limit: int) -> int:
    """How much to take for a plan's peak, so that half of what is left at the limit is free."""
    return peak + max(0, min(round(MORE * peak), (limit - peak) // 2))


def take_at_once(
    devices: Sequence[torch.device], streams: Sequence[Stream], peaks: Sequence[int], limit: int
) -> None:
    """Have the allocator keep what a plan needs on each GPU for its stream, where there is so much.

    An allocator that grows bit by bit until a limit has holes by then, gives all back, and grows
    anew: the GPU stands still while it does. Only where it can give back parts of what it has
    taken at once, in expandable segments: other streams may need more than the limit leaves them.
    """
    if not _gives_back_parts():
        return
    for device, stream, peak in zip(devices, streams, peaks, strict=True):
        if device.type == "cuda":
            with stream.use(), suppress(torch.OutOfMemoryError):
                torch.empty(arena_bytes(peak, limit), dtype=torch.uint8, device=device)
    count_peaks_anew(devices)


def _gives_back_parts() -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)
