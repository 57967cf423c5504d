"""Transit: masters and optimizer states that lie on the host and are updated on a device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .host_copies import HostCopies
from .host_memory import host_bytes
from .layers import Layers, WeightCopy
from .masters import Masters
from .quantised import parts_of, rebuilt
from .streams import Stream
from .turns import Turns
from .values import copy_each, read_on_current_stream


class Transit:
    """Brings a layer's states to a device and, with the new weights, back to where they were.

    Each has its place on the host for good, so that a step takes no new memory there. Masters that
    lie in what uploads read are not brought up: the visit's own copy is updated in their stead.
    """

    def __init__(
        self,
        layers: Layers,
        masters: Masters,
        copies: Mapping[int, HostCopies],
        pin: bool,
        turns: Turns,
    ) -> None:
        self._layers, self._masters, self._copies = layers, masters, copies
        self._pin, self._turns = pin, turns
        self._homes: dict[nn.Parameter, Tensor] = {}
        self._states: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._visits: dict[int, WeightCopy] = {}
        self._sent: dict[int, list[Tensor]] = {}

    def up(self, layer: int, device: torch.device, computes: Stream) -> None:
        """Bring what an update needs to a device, on the current stream.

        It takes the memory of the stream that computes, until all is down and waited for: whoever
        updates need not say that it reads there, even if it puts other tensors in their place.
        """
        masters, states = [], []
        for name, each in self._trained(layer).items():
            self._homes[each] = self._at_home(each.data)
            if name not in self._copies[layer].lent:
                masters.append(each)
            for part in self._masters.slices.of(each):
                large = self._masters.large_states(part).items()
                self._states[part] = {key: rebuilt(value, self._at_home) for key, value in large}
                states.append(part)
        values = [self._homes[each] for each in masters]
        values += [value for part in states for value in self._states[part].values()]
        parts = [each for value in values for each in parts_of(value)]
        with computes.memory():
            copies = [torch.empty_like(part, device=device) for part in parts]
        copy_each(list(zip(copies, parts, strict=True)))
        self._sent[layer] = copies
        sent = iter(copies)
        for each in masters:
            each.data = next(sent)
        for part in states:
            there = self._masters.optimizer.state.get(part, {})
            for key, value in self._states[part].items():
                there[key] = rebuilt(value, lambda _: next(sent))

    def _at_home(self, part: Tensor) -> Tensor:
        """A tensor where it will stay on the host, in memory that a device can copy from."""
        if not self._pin or part.is_pinned():
            return part
        return _place_for(part, self._pin).copy_(part)

    def take(self, layer: int, weights: WeightCopy) -> None:
        """Have a visit's copy of the weights updated, where the masters lie in its source.

        Elsewhere it takes the new weights on their way down, in the dtype that is computed in.
        """
        self._visits[layer] = weights
        for name, each in self._trained(layer).items():
            if name in self._copies[layer].lent:
                each.data = weights.parameters[name].data
                read_on_current_stream(each.data)
                weights.flat = None  # It is the masters' now, until they are down.

    @torch.no_grad()
    def weights_down(self, layer: int, step: int) -> None:
        """Bring a layer's new weights down, and wait until what uploads read has them.

        That is what the next step that uses them reads.
        """
        copies, trained = self._copies[layer], self._trained(layer)
        visit, places = self._visits.pop(layer).parameters, copies.named(step)
        copy_each([(visit[name].data, each.data) for name, each in trained.items()])
        copy_each([(places[name], visit[name].data) for name in trained])
        self._wait()
        for name, each in trained.items():
            if name in copies.lent:
                each.data = self._homes.pop(each)
        self._masters.slices.bind(layer)

    @torch.no_grad()
    def states_down(self, layer: int) -> None:
        """Bring a layer's states and masters to their places on the host, and wait for them."""
        trained = self._trained(layer).values()
        pairs = [(self._homes[each], each.data) for each in trained if each in self._homes]
        for each in trained:
            for part in self._masters.slices.of(each):
                homes = self._states[part]
                for key, value in self._masters.large_states(part).items():
                    if key not in homes:
                        homes[key] = rebuilt(value, lambda new: _place_for(new, self._pin))
                    pairs += zip(parts_of(homes[key]), parts_of(value), strict=True)
        copy_each(pairs)
        self._wait()
        del self._sent[layer]
        for each in trained:
            each.data = self._homes.pop(each, each.data)
            for part in self._masters.slices.of(each):
                self._masters.optimizer.state.get(part, {}).update(self._states.pop(part))
        self._masters.slices.bind(layer)

    def _wait(self) -> None:
        if self._pin:
            with self._turns.outside():
                torch.cuda.current_stream().synchronize()

    def _trained(self, layer: int) -> dict[str, nn.Parameter]:
        owned = self._layers.owned_by(layer)
        return {name: each for name, each in owned.items() if each.requires_grad}


def _place_for(part: Tensor, pin: bool) -> Tensor:
    return host_bytes(part.nbytes, pin).view(part.dtype).view(part.shape)
