"""A lane's thread: how many threads torch's operations on the CPU use in it."""

import threading
from collections.abc import Iterator

import pytest
import torch

from roundel.executor.lanes import LaneThread
from roundel.executor.run import Run
from roundel.executor.streams import CpuStream
from roundel.policies.lowering import lower
from roundel.policies.op import Op
from roundel.policies.plan import Plan
from roundel.policies.work import Work
from roundel.traces.machine import ideal_machine

from ..costs import make_trace


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_operations_use_so_many_threads_as_the_lane_says_and_elsewhere_as_before() -> None:
    program = lower(
        [Plan(((Op("F", 0, 1, 0), Op("B", 0, 1, 0)),))], Work(make_trace(1), ideal_machine(1), 1)
    )
    lane = next(number for number, each in enumerate(program.lanes) if each.kind == "compute")
    seen: list[int] = []

    def handler(task: int) -> None:
        torch.ones(2**20).add_(1)  # Enough for several threads, which torch counts anew here.
        seen.append(torch.get_num_threads())

    thread = LaneThread("counted", CpuStream(), threads=2)
    run = Run(program)
    thread.submit(run, lane, handler)
    run.wait()
    thread.close()
    assert set(seen) == {2}
    assert torch.get_num_threads() == 3
    elsewhere = threading.Thread(target=handler, args=(-1,))
    elsewhere.start()
    elsewhere.join()
    assert seen[-1] == 3
