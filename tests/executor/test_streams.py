"""Memory that one stream fills among another's. It needs a GPU (ROUNDEL_TEST_DEVICE)."""

import pytest
import torch

from roundel.executor.streams import CudaStream, make_stream

from . import toy

SIZE = 2**24
LONG = 200_000_000
"""Clock cycles, about a tenth of a second."""


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    with make_stream(torch.device("cpu")).memory():
        assert torch.empty(3).shape == (3,)


@pytest.mark.skipif(toy.PLACE.type != "cuda", reason="needs ROUNDEL_TEST_DEVICE")
def test_memory_of_another_stream_is_filled_when_that_stream_is_done_with_it() -> None:
    """It was let go of by work that has been launched, but has not begun."""
    computes, fills = CudaStream(toy.PLACE), CudaStream(toy.PLACE)
    with computes.use():
        source = torch.ones(SIZE, device=toy.PLACE)
        torch.cuda._sleep(LONG)
        total = source.sum()
        place = source.data_ptr()
        del source
    with fills.use():
        with computes.memory():
            new = torch.empty(SIZE, device=toy.PLACE)
        assert new.data_ptr() == place
        new.fill_(torch.nan)
    torch.cuda.synchronize(toy.PLACE)
    assert total.item() == SIZE
