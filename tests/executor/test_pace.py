"""A device's queue is never full: who launches waits for what was launched long before."""

import torch

from roundel.executor.pace import AHEAD, BACKWARD, Pace
from roundel.executor.streams import CpuMark


class Noted(CpuMark):
    """A mark that says when it was waited for."""

    def __init__(self, number: int, waited: list[int]) -> None:
        super().__init__()
        self._number, self._waited = number, waited

    def block(self) -> None:
        self._waited.append(self._number)


def paced() -> tuple[Pace, list[int]]:
    made: list[int] = []
    waited: list[int] = []

    def mark(device: torch.device) -> Noted:
        made.append(len(made))
        return Noted(made[-1], waited)

    return Pace(torch.device("cpu"), mark), waited


def test_so_many_forwards_are_under_way_and_no_more() -> None:
    pace, waited = paced()
    for _ in range(AHEAD):
        pace.wait()
        pace.launched(1)
    assert waited == []
    for number in range(3):
        pace.wait()
        pace.launched(1)
        assert waited == list(range(number + 1))


def test_a_backward_counts_as_its_layers_do() -> None:
    """Of a stage larger than the queue none is under way when the next forward is launched."""
    pace, waited = paced()
    pace.wait()
    pace.launched(1)
    pace.launched(BACKWARD * AHEAD)
    pace.wait()
    assert waited == [0, 1]
    pace.launched(BACKWARD)
    pace.wait()
    assert waited == [0, 1]
