"""Transit: masters and optimizer states that lie on the host and are updated on a device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .bundle import Bundle
from .host_copies import HostCopies
from .host_memory import host_bytes
from .layers import Layers, WeightCopy
from .masters import Masters
from .quantised import parts_of, rebuilt
from .streams import Stream, mark_now
from .values import copy_each, read_on_current_stream
from .weights import part_bounds


class Transit:
    """Brings a layer's states to a device and, with the new weights, back to where they were.

    A layer's have their place on the host for good, in few pieces of memory, so that a step takes
    no new memory there and few copies bring all. Masters that lie in what uploads read are not
    brought up: the visit's own copy is updated in their stead.
    """

    def __init__(
        self, layers: Layers, masters: Masters, copies: Mapping[int, HostCopies], pin: bool
    ) -> None:
        self._layers, self._masters, self._copies, self._pin = layers, masters, copies, pin
        self._lent: dict[nn.Parameter, Tensor] = {}
        self._homes: dict[int, Bundle] = {}
        self._sent: dict[int, Bundle] = {}
        self._visits: dict[int, tuple[WeightCopy, Tensor]] = {}

    def up(self, layer: int, device: torch.device, computes: Stream) -> None:
        """Bring what an update needs to a device, on the current stream.

        It takes the memory of the stream that computes, until all is down and waited for: whoever
        updates need not say that it reads there, even if it puts other tensors in their place.
        """
        for name, each in self._trained(layer).items():
            if name in self._copies[layer].lent:
                self._lent[each] = each.data
        parts = self._parts(layer)
        home = self._homes.get(layer)
        if home is None or not home.holds(parts):
            home = self._new_home(layer, parts)
            copy_each(list(zip(home.views, parts, strict=True)))

        def room(nbytes: int) -> Tensor:
            with computes.memory():
                return torch.empty(nbytes, dtype=torch.uint8, device=device)

        self._sent[layer] = home.there(room)
        self._put(layer, self._sent[layer])

    def _new_home(self, layer: int, parts: list[Tensor]) -> Bundle:
        def room(nbytes: int) -> Tensor:
            return host_bytes(nbytes, self._pin)

        # Masters are saved with the weights, states without them.
        self._homes[layer] = Bundle.like(parts, len(self._moving(layer)), room)
        return self._homes[layer]

    def _parts(self, layer: int) -> list[Tensor]:
        """The plain tensors that move: a layer's masters that are not lent, and its states."""
        masters = [each.data for each in self._moving(layer)]
        states = [value for _, _, value in self._states(layer)]
        return [part for value in masters + states for part in parts_of(value)]

    def _put(self, layer: int, bundle: Bundle) -> None:
        """Have a layer's masters and states be what lies in a bundle."""
        views = iter(bundle.views)
        for each in self._moving(layer):
            each.data = next(views)
        for part, name, value in self._states(layer):
            self._masters.optimizer.state[part][name] = rebuilt(value, lambda _: next(views))

    def _moving(self, layer: int) -> list[nn.Parameter]:
        lent = self._copies[layer].lent
        return [each for name, each in self._trained(layer).items() if name not in lent]

    def _states(self, layer: int) -> list[tuple[nn.Parameter, str, Tensor]]:
        return [
            (part, name, value)
            for each in self._trained(layer).values()
            for part in self._masters.slices.of(each)
            for name, value in self._masters.large_states(part).items()
        ]

    def take(self, layer: int, weights: WeightCopy) -> None:
        """Have a visit's copy of the weights updated, where the masters lie in its source.

        Elsewhere it takes the new weights on their way down, in the dtype that is computed in.
        """
        assert weights.flat is not None
        self._visits[layer] = weights, weights.flat
        for name, each in self._trained(layer).items():
            if name in self._copies[layer].lent:
                each.data = weights.parameters[name].data
                read_on_current_stream(each.data)
                weights.flat = None  # It is the masters' now, until they are down.

    @torch.no_grad()
    def weights_down(self, layer: int, step: int, part: int = 0, parts: int = 1) -> None:
        """Bring a part of a layer's new weights down, and wait until what uploads read has it.

        That is what the next step that uses them reads. The parts come in their order.
        """
        copies, (visit, source) = self._copies[layer], self._visits[layer]
        trained = self._trained(layer)
        if part == 0:
            copy_each([(visit.parameters[name].data, each.data) for name, each in trained.items()])
        first, stop = part_bounds(copies.layout.nbytes, part, parts)
        bounds = [
            (max(first, slot.start), min(stop, slot.stop))
            for slot in copies.layout.slots
            if slot.name in trained
        ]
        target = copies.flat(step)
        copy_each([(target[a:b], source[a:b]) for a, b in bounds if a < b])
        self._wait()
        if part == parts - 1:
            del self._visits[layer]
            for name, each in trained.items():
                if name in copies.lent:
                    each.data = self._lent.pop(each)
            self._masters.slices.bind(layer)

    @torch.no_grad()
    def states_down(self, layer: int) -> None:
        """Bring a layer's states and masters to their places on the host, and wait for them."""
        parts, sent = self._parts(layer), self._sent.pop(layer)
        home = self._homes[layer]
        if not home.fits(parts):
            home = self._new_home(layer, parts)
        if sent.holds(parts):
            home.take_all(sent)
        else:
            copy_each(list(zip(home.views, parts, strict=True)))
        self._wait()
        self._put(layer, home)
        self._masters.slices.bind(layer)

    def _wait(self) -> None:
        if self._pin:
            mark_now(torch.device("cuda")).block()

    def _trained(self, layer: int) -> dict[str, nn.Parameter]:
        owned = self._layers.owned_by(layer)
        return {name: each for name, each in owned.items() if each.requires_grad}
