"""What it costs to launch a task: how close a device's tasks can follow each other."""

import time

import torch

from ..policies.lowering import lower
from ..policies.op import Op
from ..policies.plan import Plan
from ..policies.work import Work
from ..traces.machine import ideal_machine
from ..traces.trace import LayerCost, Trace
from .lanes import LaneThread
from .run import Run
from .streams import make_stream

TASKS = 400


def task_ns(device: torch.device) -> int:
    """Nanoseconds from one task to the next of a lane whose tasks do nothing."""
    layer = LayerCost(name="nothing", forward_ns=1, backward_ns=1)
    trace = Trace(name="nothing", device="", provenance="", microbatch_tokens=1, layers=(layer,))
    work = Work(trace, ideal_machine(1), TASKS // 2)
    ops = tuple(Op(kind, 0, 1, number) for number in range(TASKS // 2) for kind in "FB")
    program = lower([Plan((ops,))], work)
    lane = next(n for n, each in enumerate(program.lanes) if each.kind == "compute")
    thread = LaneThread("measures", make_stream(device))
    try:
        times = []
        for _ in range(3):
            run = Run(program)
            start = time.perf_counter_ns()
            thread.submit(run, lane, lambda task: None)
            run.wait()
            times.append(time.perf_counter_ns() - start)
    finally:
        thread.close()
    return min(times) // TASKS
