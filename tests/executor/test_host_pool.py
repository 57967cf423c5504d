"""What waits on the host lies in memory of its exact size, which is used again."""

import torch
from torch import nn

import roundel
from roundel.executor.host_pool import HostPool
from roundel.executor.streams import CpuMark
from roundel.executor.trainer import Trainer

from . import toy


class Late(CpuMark):
    """A mark that is reached when somebody waits for it."""

    waited = False

    def block(self) -> None:
        self.waited = True


def test_memory_is_used_again_when_its_reader_is_done() -> None:
    pool, mark = HostPool(pin=False), Late()
    value = (torch.arange(6.0).view(2, 3), {"more": torch.ones(5, dtype=torch.bool)})
    first = pool.copy(value)
    assert torch.equal(first[0], value[0])
    assert torch.equal(first[1]["more"], value[1]["more"])
    assert len({each.data_ptr() for each in (value[0], first[0])}) == 2
    second = pool.copy(value)
    assert second[0].data_ptr() != first[0].data_ptr()
    pool.give_back(first, mark)
    assert not mark.waited
    third = pool.copy(value)
    assert mark.waited
    assert third[0].data_ptr() == first[0].data_ptr()
    assert pool.copy(torch.ones(0, 3)).shape == (0, 3)


def test_steps_share_the_memory() -> None:
    with Trainer(
        toy.blocks(),
        nn.functional.mse_loss,
        policy=roundel.RoundRobin(**toy.CUTS, activations="host"),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
    ) as trainer:
        for batch in toy.vectors(4, size=8):
            timeline = trainer.step(*batch).timeline
        assert trainer._ready is not None
        pool = trainer._ready.machinery.on_host
        assert not pool._used
        spans = list(timeline.spans())
        waiting = [span for span in spans if span.kind in ("offload", "download")]
        # A layer's gradient is a weight's and a bias's, of two linear layers.
        assert 0 < sum(map(len, pool._free.values())) <= 4 * len(waiting)


def test_sizes_that_are_not_asked_for_any_more_are_let_go() -> None:
    pool, mark = HostPool(pin=False), Late()
    for size in (5, 7):
        pool.give_back(pool.copy(torch.ones(size)), mark)
    pool.tidy()
    assert set(pool._free) == {20, 28}
    pool.give_back(pool.copy(torch.ones(7)), CpuMark())
    pool.tidy()
    assert set(pool._free) == {28}
    assert mark.waited


def test_waiting_for_all_steps_leaves_the_memory_to_the_next() -> None:
    with Trainer(
        toy.blocks(),
        nn.functional.mse_loss,
        policy=roundel.RoundRobin(**toy.CUTS, activations="host", optimizer_on="device"),
        optimizer=toy.ADAMW,
        devices=toy.devices(2),
        microbatches=2,
    ) as trainer:
        first, *others = toy.vectors(4, size=8)
        places: list[set[int]] = []
        for batch in (first, *others):
            trainer.step(*batch)
            assert trainer._ready is not None
            pool = trainer._ready.machinery.on_host
            trainer.flush()
            free = [flat for flats in pool._free.values() for flat, _ in flats]
            places.append({flat.data_ptr() for flat in free})
        assert places[1]
        assert places[1] <= places[2] <= places[3]
