"""A device's queue is never full: who launches waits for what was launched long before."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from roundel.executor.compute import Computer, Randomness
from roundel.executor.pace import AHEAD, BACKWARD, MARKED, Pace
from roundel.executor.streams import CpuMark
from roundel.policies.op import Op


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
    for number in range(3 * MARKED):
        pace.wait()
        pace.launched(1)
        assert waited == list(range(number // MARKED + 1))


def test_a_backward_counts_as_its_layers_do() -> None:
    """Of a stage larger than the queue none is under way when the next forward is launched."""
    pace, waited = paced()
    pace.wait()
    pace.launched(1)
    pace.launched(BACKWARD * AHEAD)
    pace.wait()
    assert waited == [0]
    pace.launched(BACKWARD)
    pace.wait()
    assert waited == [0]


def test_backward_of_several_layers_is_noted_layer_by_layer() -> None:
    """Else what is launched behind it would wait for all of it, and the device for that."""
    device, noted = torch.device("cpu"), list[int]()
    computer = Computer(
        device, lambda output, target: output.sum(), Randomness(0), None, [True] * 4
    )
    waits = 0

    class Noting(Pace):
        def wait(self) -> None:
            nonlocal waits
            waits += 1

        def launched(self, forwards: int) -> None:
            noted.append(forwards)

    computer._pace = Noting(device)
    layers: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Dropout(0.0), nn.Linear(2, 2)]
    for _ in range(2):
        noted.clear()
        waits = 0
        graph, _ = computer.forward_with_graph(
            Op("R", 0, 4, 0), 0, layers, torch.ones(1, 2), lambda value: value, False, False
        )
        assert (noted, waits) == ([1] * 4, 4)
        computer.backward(Op("B", 0, 4, 0), graph, [torch.ones(1, 2)])
        assert (noted[4:], waits) == ([BACKWARD] * 4, 4 + 3)


class Passes(nn.Module):
    """Hands on a leaf, a parameter of its own, and what it computes in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, value: Any) -> Any:
        return value[0], self.inner.weight, {"hidden": self.inner(value[2]["hidden"])}


def test_what_is_handed_on_as_it_came_tells_nothing() -> None:
    device, order = torch.device("cpu"), list[str]()
    computer = Computer(device, lambda output, target: output, Randomness(0), None, [True] * 3)
    computer._pace.launched = lambda forwards: order.append("launched")  # type: ignore[method-assign]
    layers = [Passes(), Passes(), Passes()]
    for number, layer in enumerate(layers):
        layer.inner.bias.register_hook(lambda grad, number=number: order.append(f"{number}"))
    value = (torch.ones(2), torch.ones(2), {"hidden": torch.ones(1, 2)})
    for _ in range(3):
        graph, _ = computer.forward_with_graph(
            Op("R", 0, 3, 0), 0, layers, value, lambda value: value, False, False
        )
        order.clear()
        computer.backward(Op("B", 0, 3, 0), graph, [None, None, torch.ones(1, 2)])
        assert order.count("launched") == 3
        assert order.index("launched") < order.index("0")
        assert order[-1] == "launched"


def test_what_passes_between_layers_goes_with_the_graph() -> None:
    """Not when Python's collector comes."""
    computer = Computer(torch.device("cpu"), lambda output, target: output, Randomness(0), None, [])
    kept: list[Any] = []

    class Kept(nn.Linear):
        def forward(self, value: Tensor) -> Tensor:
            output = super().forward(value)
            kept.append(weakref.ref(output))
            return output

    gc.collect()
    gc.disable()
    try:
        graph, _ = computer.forward_with_graph(
            Op("R", 0, 2, 0),
            0,
            [Kept(2, 2), nn.Tanh()],
            torch.ones(1, 2),
            lambda value: value,
            False,
            False,
        )
        computer.backward(Op("B", 0, 2, 0), graph, [torch.ones(1, 2)])
        del graph
        assert kept[0]() is None
    finally:
        gc.enable()


def test_layers_that_no_gradient_passes_count_at_the_end() -> None:
    device, noted = torch.device("cpu"), list[int]()
    computer = Computer(
        device, lambda output, target: output.sum(), Randomness(0), None, [True] * 3
    )
    computer._pace.launched = noted.append  # type: ignore[method-assign]
    layers: list[nn.Module] = [nn.Linear(2, 2) for _ in range(3)]
    op = Op("R", 0, 3, 0)
    graph, _ = computer.forward_with_graph(
        op, 0, layers, torch.ones(1, 2), lambda value: value, False, False
    )
    computer.backward(Op("B", 0, 3, 0), graph, [torch.ones(1, 2)])
    noted.clear()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    graph, _ = computer.forward_with_graph(
        Op("R", 0, 3, 0),
        0,
        [frozen, frozen, nn.Linear(2, 2)],
        torch.ones(1, 2),
        lambda value: value,
        False,
        False,
    )
    computer.backward(Op("B", 0, 3, 0), graph, [torch.ones(1, 2)])
    assert noted[3:] == [BACKWARD * 3]
