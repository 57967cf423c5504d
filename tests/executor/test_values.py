"""Copies in pieces: all arrives, and no piece is larger than it should be."""

import pytest
import torch

from roundel.executor import values
from roundel.executor.values import copy_each, in_pieces


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Small tensors, a large one, one of another dtype, and one that does not lie in order."""
    sources = [torch.rand(3), torch.rand(5), torch.rand(40, 7), torch.rand(100).double()]
    sources += [torch.rand(30, 20).T, torch.rand(2)]
    return [(torch.zeros(each.shape, dtype=torch.float32), each) for each in sources]


def test_pieces_are_the_whole_and_small() -> None:
    whole = pairs()
    pieces = list(in_pieces(whole, 256))
    for piece in pieces:
        for target, source in piece:
            target.copy_(source)
            assert source.nbytes <= 256 or not source.is_contiguous()
    for target, source in whole:
        assert torch.equal(target, source.float())
    # What is small goes together; only the last piece has less than it could.
    sizes = [sum(each.nbytes for _, each in piece) for piece in pieces]
    assert all(size >= 256 for size in sizes[:-1])
    whole_ones = sum(each.nbytes for _, each in whole if not each.is_contiguous())
    assert max(sizes) < 2 * 256 + whole_ones
    assert len(pieces[0]) == 3


def test_copies_between_devices_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on no device stands for one on another, as the CPU has none."""
    monkeypatch.setattr(values, "PIECE_BYTES", 64)
    seen: list[int] = []
    monkeypatch.setattr(
        values, "_copy_at_once", lambda piece: seen.append(sum(each.nbytes for _, each in piece))
    )
    there = torch.empty(100, dtype=torch.uint8, device="meta")
    copy_each([(there, torch.zeros(100, dtype=torch.uint8))])
    assert seen == [64, 36]
    copy_each([(torch.ones(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8))])
    assert seen == [64, 36, 100]
    copy_each([])
    assert sum(seen) == 200


def test_the_same_memory_stays() -> None:
    value = torch.arange(4.0)
    target = torch.zeros(4)
    copy_each([(value, value.detach()), (target, value)])
    assert torch.equal(target, value)


def test_one_piece_is_under_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that always has more of a copy to do does nothing else meanwhile."""
    events: list[str] = []

    class Noted:
        def __init__(self) -> None:
            self.number = sum(each.startswith("copy") for each in events)

        def block(self) -> None:
            events.append(f"wait {self.number}")

    def copy(piece: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        events.append(f"copy {sum(each.startswith('copy') for each in events) + 1}")

    monkeypatch.setattr(values, "PIECE_BYTES", 25)
    monkeypatch.setattr(values, "gpus_of", lambda devices: {torch.device("cuda:0")})
    monkeypatch.setattr(values, "mark_now", lambda device: Noted())
    monkeypatch.setattr(values, "_copy_at_once", copy)
    there = torch.empty(100, dtype=torch.uint8, device="meta")
    copy_each([(there, torch.zeros(100, dtype=torch.uint8))])
    assert events == ["copy 1", "wait 1", "copy 2", "wait 2", "copy 3", "wait 3", "copy 4"]
