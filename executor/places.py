"""Places to train on: devices by name, and how much memory they have."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

from ..traces.errors import InputError

Devices = list[torch.device]

VIRTUAL_DEVICES = 2
"""How many virtual devices a machine without a GPU gets."""


def find_devices(names: Sequence[str] | None = None) -> Devices:
    """The devices of these names; of a number, as in ["4"], so many CUDA or virtual devices.

    None: all CUDA devices, or virtual ones on the CPU. Raises InputError for one that is not there.
    """
    count = torch.cuda.device_count()
    if names is None:
        names = [str(count or VIRTUAL_DEVICES)]
    if len(names) == 1 and names[0].isdecimal():
        wanted = int(names[0])
        if wanted < 1:
            raise InputError("devices: there must be at least one")
        names = [f"cuda:{number}" for number in range(wanted)] if count else ["cpu"] * wanted
    return [_found(name, count) for name in names]


def device_name(device: torch.device) -> str:
    """What a device is: a GPU by its model, as two machines may both have a cuda:0."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def gpus_of(devices: Iterable[torch.device]) -> set[torch.device]:
    """The GPUs among these devices, each once."""
    return {device for device in devices if device.type == "cuda"}


def threads_of_updates(devices: Sequence[torch.device]) -> int:
    """Threads of an update on the host: two cores of each GPU are for those that launch its work.

    Where an update takes all, the one that shares its core holds up the others again and again. Of
    few cores it has half.
    """
    everyone = torch.get_num_threads()
    return max(1, everyone // 2, everyone - 2 * len(gpus_of(devices)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch's operations on the CPU use so many threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sharing_cores(devices: Sequence[torch.device]) -> AbstractContextManager[None]:
    """Let each virtual device on the CPU have its share of the cores, instead of all of them."""
    virtual = list(devices).count(torch.device("cpu"))
    return threads(max(1, torch.get_num_threads() // max(1, virtual)))


def memory_limits(devices: Sequence[torch.device], limit: int) -> list[int]:
    """Bytes that each device may use: `limit`, or its share of what is free. 0: not limited."""
    if limit:
        return [limit] * len(devices)
    return [_memory(device) // devices.count(device) for device in devices]


def host_memory() -> int:
    """Bytes of the host's memory that a model's training may have; 0 where the system does not say.

    All that this process may have but for 2 GiB and 4 %, which Python, torch, CUDA and what lies
    between pages take: 2.3 to 6 GiB beside plans of 47 to 106 GiB, measured
    (docs/results/2026-11-25-frontier.md).
    """
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    with suppress(OSError):
        allowed = _CONTAINER_LIMIT.read_text(encoding="ascii").strip()
        whole = min(whole, int(allowed)) if allowed.isdecimal() else whole
    return max(whole // 2, int(whole * 0.96) - 2 * 2**30)


_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def count_peaks_anew(devices: Sequence[torch.device]) -> None:
    """Forget the peaks of GPU memory so far."""
    for device in gpus_of(devices):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(devices: Sequence[torch.device]) -> int | None:
    """The most that was allocated on any of the GPUs; None where there is none."""
    return max(map(torch.cuda.max_memory_allocated, gpus_of(devices)), default=None)


def allocator_retries(devices: Sequence[torch.device]) -> int:
    """How often the GPUs' allocators had to give back all memory that they kept, so far.

    The GPU stands still then, and what was given back is slow to come again.
    """
    counts = (
        torch.cuda.memory_stats(each).get("num_alloc_retries", 0) for each in gpus_of(devices)
    )
    return sum(map(int, counts))


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(device)[0])


def _found(name: str, count: int) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"devices: no device {name!r}; write names as torch has them, as in cpu or cuda:0"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"devices: {name}: use cpu or cuda devices")
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"it has {count}" if count else "it has none that torch can use"
        raise InputError(f"devices: {name}: not on this machine; {there}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
