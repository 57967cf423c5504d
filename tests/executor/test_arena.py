"""Memory that is taken at once: how much, and that steps find all that they need in it."""

import os

import pytest
import torch

import roundel
from roundel.executor import arena
from roundel.executor.arena import arena_bytes, take_at_once
from roundel.executor.streams import make_stream

from . import toy


@pytest.mark.parametrize(
    ("peak", "limit", "taken"), [(100, 1000, 110), (100, 110, 105), (100, 100, 100), (100, 90, 100)]
)
def test_some_more_than_the_peak_where_there_is_room(peak: int, limit: int, taken: int) -> None:
    assert arena_bytes(peak, limit) == taken


def test_the_cpu_has_nothing_to_take() -> None:
    place = torch.device("cpu")
    take_at_once([place], [make_stream(place)], [2**60], 2**61)


def test_only_where_parts_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not there: to take memory of it would fail."""

    class Missing:
        def use(self) -> None:
            raise AssertionError("takes memory")

    monkeypatch.setattr(arena, "count_peaks_anew", lambda devices: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    gone = torch.device("cuda", 0)
    take_at_once([gone], [Missing()], [10], 20)  # type: ignore[list-item]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(AssertionError, match="takes memory"):
        take_at_once([gone], [Missing()], [10], 20)  # type: ignore[list-item]


NEEDED = pytest.mark.skipif(
    toy.PLACE.type != "cuda" or "expandable" not in os.environ.get("PYTORCH_ALLOC_CONF", ""),
    reason="needs ROUNDEL_TEST_DEVICE and PYTORCH_ALLOC_CONF=expandable_segments:True",
)


@NEEDED
def test_more_than_there_is_is_not_taken() -> None:
    before = torch.cuda.memory_allocated(toy.PLACE)
    take_at_once([toy.PLACE], [make_stream(toy.PLACE)], [2**50], 2**51)
    assert torch.cuda.memory_allocated(toy.PLACE) == before


@NEEDED
def test_steps_find_what_they_need() -> None:
    def taken() -> int:
        return int(torch.cuda.memory_stats(toy.PLACE)["num_device_alloc"])

    batches = toy.vectors()
    with roundel.Trainer(
        toy.blocks(),
        torch.nn.functional.mse_loss,
        policy=roundel.RoundRobin(**toy.CUTS),
        optimizer=toy.ADAMW,
        devices=[str(toy.PLACE)],
        microbatches=4,
        memory_limit="1GiB",
    ) as trainer:
        for batch in batches[:2]:
            trainer.step(*batch)
        before = taken()
        trainer.step(*batches[2])
        assert taken() == before
        assert torch.cuda.max_memory_allocated(toy.PLACE) < 2**29
