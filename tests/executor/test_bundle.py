"""Tensors that move together: where they lie, and that a copy has them all."""

import pytest
import torch

from roundel.executor import bundle
from roundel.executor.bundle import Bundle

PARTS = [
    torch.arange(6.0),
    torch.arange(4.0).double(),
    torch.arange(5.0) + 1,
    torch.zeros(0),
    torch.arange(100.0),
    torch.arange(3) + 7,
]


def _memory(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("most", [1, 64, 2**30])
@pytest.mark.parametrize("apart", [0, 2, 6])
def test_a_copy_elsewhere_has_what_was_put_in(
    apart: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "TOGETHER_BYTES", most)
    home = Bundle.like(PARTS, apart, _memory)
    assert home.fits(PARTS)
    assert not home.holds(PARTS)
    for place, part in zip(home.views, PARTS, strict=True):
        place.copy_(part)
    for copied, part in zip(home.there(_memory).views, PARTS, strict=True):
        assert torch.equal(copied, part)


def test_pieces_are_few_of_one_dtype_and_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(bundle: Bundle) -> list[list[str]]:
        return [[slot.name for slot in layout.slots] for layout in bundle.layouts]

    assert together(Bundle.like(PARTS, 2, _memory)) == [["0", "1"], ["2", "3", "4"], ["5"]]
    monkeypatch.setattr(bundle, "TOGETHER_BYTES", 60)
    assert together(Bundle.like(PARTS, 2, _memory)) == [["0", "1"], ["2", "3"], ["4"], ["5"]]
    monkeypatch.setattr(bundle, "TOGETHER_BYTES", 40)
    assert together(Bundle.like(PARTS, 2, _memory)) == [["0"], ["1"], ["2", "3"], ["4"], ["5"]]
