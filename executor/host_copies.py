"""HostCopies: what uploads read, a layer's weights in pinned memory."""

from collections.abc import Container

import torch
from torch import Tensor, nn

from .host_memory import host_bytes
from .layers import Layout
from .places import gpus_of
from .streams import mark_now
from .values import copy_each


class HostCopies:
    """What a layer's uploads read: its weights in the compute dtype, in pinned memory.

    `copies` is 2 where a step works on older weights while newer ones are made. Where one copy in
    the masters' own dtype is enough, the masters themselves lie in it: `lent` names them.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        owned: Container[str],
        compute: torch.dtype | None,
        copies: int,
        pin: bool,
    ) -> None:
        self.layout = Layout.of(parameters, compute)
        self._parameters = parameters
        self.flats = [host_bytes(self.layout.nbytes, pin) for _ in range(copies)]
        self.lent = {
            slot.name
            for slot in self.layout.slots
            if copies == 1 and slot.name in owned and slot.dtype == parameters[slot.name].dtype
        }
        self._views = [self.layout.views(flat) for flat in self.flats]
        for number in range(copies):
            self.refresh(number)
        for name in self.lent:
            parameters[name].data = self.named(0)[name]

    def flat(self, step: int) -> Tensor:
        """The copy that step number `step` works on."""
        return self.flats[step % len(self.flats)]

    def named(self, step: int) -> dict[str, Tensor]:
        """The weights in that copy, by the layer's own names."""
        return self._views[step % len(self._views)]

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Write the masters' values into the copy of step number `step`."""
        masters = {name: self._parameters[name].data for name in self.named(step)}
        copy_each([(view, masters[name]) for name, view in self.named(step).items()])
        for device in gpus_of(each.device for each in masters.values()):
            mark_now(device).block()
