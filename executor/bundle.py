"""Bundle: tensors that lie one behind the other, to be copied as one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layers import Layout


class Bundle:
    """Places for tensors in one piece of memory: `flat`, of bytes, and `views` of it."""

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        self.layout, self.flat = layout, flat
        self.views = list(layout.views(flat).values())

    @classmethod
    def like(cls, parts: Sequence[Tensor], memory: Callable[[int], Tensor]) -> "Bundle":
        """Places for tensors like these; `memory` makes so many bytes."""
        layout = Layout.of({str(number): part for number, part in enumerate(parts)}, None)
        return cls(layout, memory(layout.nbytes))

    def there(self, memory: Callable[[int], Tensor]) -> "Bundle":
        """A copy elsewhere, made on the current stream; nobody waits."""
        copy = Bundle(self.layout, memory(self.layout.nbytes))
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

    def take_all(self, other: "Bundle") -> None:
        """Copy what another one of the same layout has."""
        if len(self.flat):
            with torch.no_grad():
                self.flat.copy_(other.flat, non_blocking=True)
