"""Host memory for what stays there as long as training goes on, of exactly the size asked for."""

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_EVERY_DEVICE = 1
"""cudaHostRegisterPortable."""


def host_bytes(nbytes: int, pin: bool) -> Tensor:
    """So many bytes of zeros on the host, whole pages; `pin`: such as GPUs copy from and to.

    torch's own pinned memory is rounded up to a power of two, so that a model takes up to twice its
    size; it is taken where the system does not let memory be pinned after it is made.
    """
    if sys.platform != "linux":
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin)
    pages = _Pages(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # Not every kernel has them.
            pages.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
    if not pin:
        return flat
    flat.zero_()  # All threads bring the pages in; pinning them one after the other is slow.
    try:
        pages.pin(flat.data_ptr())
    except RuntimeError:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    return flat


class _Pages(mmap.mmap):
    """Memory from the system, which lives as long as a tensor in it, and may be pinned."""

    _address = 0

    def pin(self, address: int) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(address, len(self), _EVERY_DEVICE))
        self._address = address

    def __del__(self) -> None:
        if self._address:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self._address)
