"""Memory over time of a program whose tasks ran at given times."""

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints, MemoryCurve
from .program import LABELS, Program

HOLDERS = 4


def memory_curves(
    program: Program, start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]
) -> tuple[MemoryCurve, ...]:
    """One curve per device and the host's last, in bytes, with the largest holders at the peak."""
    buffers = program.buffers
    freed = np.full(len(buffers.nbytes), -1, dtype=np.int64)
    np.maximum.at(freed, buffers.use_buffer, end_ns[buffers.use_task])
    by_pool = np.argsort(buffers.pool, kind="stable")
    machine = program.work.machine
    names = [*(device.name for device in machine.devices), "host"]
    limits = [*(device.memory_bytes for device in machine.devices), machine.host.memory_bytes]
    bounds = np.searchsorted(buffers.pool[by_pool], np.arange(len(names) + 1))
    curves = []
    for pool, (name, limit) in enumerate(zip(names, limits, strict=True)):
        mine = by_pool[bounds[pool] : bounds[pool + 1]]
        alloc = buffers.alloc[mine]
        taken = np.where(alloc >= 0, start_ns[alloc], 0)
        curves.append(
            _curve(name, limit, taken, freed[mine], buffers.nbytes[mine], buffers.label[mine])
        )
    return tuple(curves)


def _curve(
    name: str, limit: int, taken: Ints, freed: Ints, nbytes: Ints, label: Ints
) -> MemoryCurve:
    goes = freed >= 0
    times = np.concatenate((taken, freed[goes]))
    change = np.concatenate((nbytes, -nbytes[goes]))
    moments, index = np.unique(times, return_inverse=True)
    delta = np.zeros(len(moments), dtype=np.int64)
    np.add.at(delta, index, change)
    used = np.cumsum(delta)
    if not len(used):
        return MemoryCurve(name, limit, np.zeros(1, dtype=np.int64), np.zeros(1, np.int64), 0, 0)
    top = int(np.argmax(used))
    peak_ns = int(moments[top])
    alive = (taken <= peak_ns) & (~goes | (freed > peak_ns))
    held = np.bincount(label[alive], weights=nbytes[alive], minlength=len(LABELS))
    largest = sorted(zip(LABELS, held.astype(np.int64).tolist(), strict=True), key=lambda x: -x[1])
    holders = tuple((what, size) for what, size in largest[:HOLDERS] if size)
    return MemoryCurve(name, limit, moments, used, int(used[top]), peak_ns, holders)
