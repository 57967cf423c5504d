"""Bundle: tensors that move together, in few pieces of memory, to be copied by few calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import Layout
from .values import copy_each

Memory = Callable[[int], Tensor]
"""Makes so many bytes."""

TOGETHER_BYTES = 512 * 2**20
"""Of several tensors in one piece of memory, at most.

A device's allocator finds room for a few such pieces where it finds none for all in one.
"""


class Bundle:
    """Places for tensors, `views`, in few pieces of memory, `flats`, one for each of the layouts.

    The names in the layouts are the tensors' numbers.
    """

    def __init__(self, layouts: Sequence[Layout], memory: Memory) -> None:
        self.layouts = layouts
        self.flats = [memory(layout.nbytes) for layout in layouts]
        named: dict[str, Tensor] = {}
        for layout, flat in zip(layouts, self.flats, strict=True):
            named |= layout.views(flat)
        self.views = [named[str(number)] for number in range(len(named))]

    @classmethod
    def like(cls, parts: Sequence[Tensor], apart: int, memory: Memory) -> "Bundle":
        """Places for tensors like these: the first `apart` together, the others by dtype.

        So what lies in a piece may be saved as it is: torch saves no memory of several dtypes.
        """
        pieces: list[dict[str, Tensor]] = []
        fills: dict[object, dict[str, Tensor]] = {}
        for number, part in enumerate(parts):
            key = "apart" if number < apart else part.dtype
            held = sum(each.nbytes for each in fills.get(key, {}).values())
            if not held or held + part.nbytes > TOGETHER_BYTES:
                fills[key] = {}
                pieces.append(fills[key])
            fills[key][str(number)] = part
        return cls([Layout.of(piece, None) for piece in pieces], memory)

    def there(self, memory: Memory) -> "Bundle":
        """A copy elsewhere, made on the current stream; nobody waits."""
        copy = Bundle(self.layouts, memory)
        copy.take_all(self)
        return copy

    def fits(self, parts: Sequence[Tensor]) -> bool:
        """Whether tensors are like those that this has places for."""
        return len(parts) == len(self.views) and all(
            part.dtype == view.dtype and part.shape == view.shape
            for part, view in zip(parts, self.views, strict=True)
        )

    def holds(self, parts: Sequence[Tensor]) -> bool:
        """Whether these tensors lie in their places."""
        return self.fits(parts) and all(
            part.data_ptr() == view.data_ptr() for part, view in zip(parts, self.views, strict=True)
        )

    @torch.no_grad()
    def take_all(self, other: "Bundle") -> None:
        """Copy what another one of the same layouts has."""
        copy_each(list(zip(self.flats, other.flats, strict=True)))
