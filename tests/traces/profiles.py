"""Exports for the tests of the import: real ones made here, and one of a GPU written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS = 32, 16


class Block(nn.Module):
    """Two linear layers and a residual sum; `factor` times as wide inside."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH * factor)
        self.down = nn.Linear(WIDTH * factor, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


Forward = Callable[[nn.Module, str, Tensor], Tensor]


def ranged(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    with record_function(name):
        return layer(x)


def plain(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return layer(x)


def range_in_checkpoint(reentrant: bool) -> Forward:
    return lambda layer, name, x: checkpoint(ranged, layer, name, x, use_reentrant=reentrant)


def checkpoint_in_range(reentrant: bool) -> Forward:
    def forward(layer: nn.Module, name: str, x: Tensor) -> Tensor:
        with record_function(name):
            return checkpoint(layer, x, use_reentrant=reentrant)

    return forward


def export(
    path: Path,
    forward: Forward = ranged,
    layers: nn.ModuleList | None = None,
    device: str = "cpu",
    microbatches: int = 3,
    backward: bool = True,
    **options: Any,
) -> Path:
    """Train one step of `layers` under the profiler and export it to `path`."""
    layers = (layers or nn.ModuleList([Block(), Block(), Block()])).to(device)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)

    def step() -> None:
        for _ in range(microbatches):
            x = torch.ones(ROWS, WIDTH, device=device, requires_grad=True)
            for number, layer in enumerate(layers):
                x = forward(layer, f"layer.{number}", x)
            loss = x.square().mean()
            if backward:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small ops would wait for a second core that others keep busy
    try:
        _profile(step, path, device, options)
    finally:
        torch.set_num_threads(threads)
    return path


def _profile(step: Callable[[], None], path: Path, device: str, options: dict[str, Any]) -> None:
    step()
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, **options) as profiler:
        step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


MAIN, ENGINE = 100, 200
"""Host threads of the export by hand: forward and autograd's."""


class Handmade:
    """An export of a GPU, written event by event; times in microseconds, as in the file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.numbers = 0

    def add(self, cat: str, name: str, thread: int, start: float, dur: float, **args: Any) -> None:
        named = {key.replace("_", " "): value for key, value in args.items()}
        row = {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": thread, "ts": start}
        self.rows.append({**row, "dur": dur, "args": named})

    def launch(
        self,
        thread: int,
        at: float,
        start: float,
        dur: float,
        name: str = "gemm",
        stream: int = 7,
        cat: str = "kernel",
    ) -> None:
        """A call at `at` on a host thread, and its kernel on a stream of device 0."""
        self.numbers += 1
        number = {"correlation": self.numbers}
        self.add("cuda_runtime", "cudaLaunchKernel", thread, at, 0.5, **number)
        self.add(cat, name, stream, start, dur, device=0, **number)
        self.rows[-1]["pid"] = 0

    def forward(self, name: str, start: float, dur: float, number: int) -> None:
        self.add("cpu_op", name, MAIN, start, dur, Sequence_number=number, Fwd_thread_id=0)

    def backward(self, name: str, start: float, dur: float, number: int, thread: int = 1) -> None:
        whole = f"autograd::engine::evaluate_function: {name}"
        args = {"Sequence_number": number, "Fwd_thread_id": thread}
        self.add("cpu_op", whole, ENGINE, start, dur, **args)
        self.add("cpu_op", name, ENGINE, start, dur, **args)

    def arrow(self, number: int, thread: int, start: float, end_thread: int, end: float) -> None:
        both = {"cat": "fwdbwd", "name": "fwdbwd", "id": number, "pid": 1}
        self.rows.append({**both, "ph": "s", "tid": thread, "ts": start})
        self.rows.append({**both, "ph": "f", "bp": "e", "tid": end_thread, "ts": end})

    def write(self, path: Path) -> Path:
        properties = [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}]
        data = {"schemaVersion": 1, "deviceProperties": properties, "traceEvents": self.rows}
        path.write_text(json.dumps(data))
        return path


def one_step() -> Handmade:
    """One microbatch of two layers and a loss; a copy beside a kernel; an optimizer's step.

    The engine's thread runs backward. Sequence numbers: layer.0 makes 5 and 6, layer.1 makes 7,
    the loss 8. `aten::ones` between the layers carries 7 too, and makes nothing.
    """
    made = Handmade()
    made.add("user_annotation", "ProfilerStep#1", MAIN, 0, 1000)
    made.add("user_annotation", "layer.0", MAIN, 10, 40)
    made.add("user_annotation", "layer.0.mlp", MAIN, 25, 10)
    made.add("user_annotation", "layer.0", MAIN, 25, 10)
    made.forward("aten::linear", 11, 10, 5)
    made.launch(MAIN, 12, 100.001, 3.002)
    made.forward("aten::gelu", 26, 8, 6)
    made.launch(MAIN, 27, 110, 4)
    made.launch(MAIN, 28, 112, 5, "copy", stream=8, cat="gpu_memcpy")
    made.forward("aten::ones", 52, 2, 7)
    made.launch(MAIN, 53, 120, 1, "fill")
    made.add("user_annotation", "layer.1", MAIN, 60, 30)
    made.forward("aten::linear", 61, 20, 7)
    made.launch(MAIN, 62, 130, 7)
    made.forward("aten::mse_loss", 95, 5, 8)
    made.launch(MAIN, 96, 140, 2, "loss")

    made.backward("MseLossBackward0", 200, 10, 8)
    made.launch(ENGINE, 201, 300, 3, "loss")
    made.backward("AddmmBackward0", 220, 10, 7)
    made.launch(ENGINE, 221, 310, 11)
    made.add("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad",
             ENGINE, 232, 3)  # fmt: skip
    made.launch(ENGINE, 233, 330, 2, "add")
    made.backward("GeluBackward0", 240, 10, 6)
    made.launch(ENGINE, 241, 340, 13)
    made.backward("AddmmBackward0", 260, 10, 5)
    made.launch(ENGINE, 261, 360, 17)
    made.arrow(1, MAIN, 61, ENGINE, 220)

    made.add("user_annotation", "Optimizer.step#SGD.step", MAIN, 400, 50)
    made.add("user_annotation", "layer.1", MAIN, 400, 50)
    made.add("cpu_op", "aten::_foreach_add_", MAIN, 401, 20)
    made.launch(MAIN, 402, 500, 19)
    return made
