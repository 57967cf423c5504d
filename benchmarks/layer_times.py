"""What a layer takes alone, warm, beside others of its kind, and beside copies.

    python benchmarks/layer_times.py [--model qwen3-1.7b] [--devices cuda:0,cuda:1] [--sequences 4]

A profile measures a layer alone. In a step the GPU has been at work for long, other GPUs work too,
their kernels launched from the same Python, and copies run both ways. Measures a block's forward
and backward on the first device as `roundel profile` does, under one of these conditions after
another. Prints milliseconds, against the first row. Without a GPU the CPU stands for it.
"""

import argparse
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from about import about
from training_common import devices_of, dtype_of

from roundel.executor.decoder import decoder_layers
from roundel.executor.host_memory import host_bytes
from roundel.executor.layers import Layers
from roundel.executor.measure import ADAM
from roundel.executor.measure_layer import LayerRun
from roundel.executor.presets import PRESETS
from roundel.executor.short_turns import short_turns
from roundel.executor.streams import make_stream
from roundel.executor.values import as_leaves, copy_each

BLOCK = 1
"""The number of the layer that is measured: the first behind the embedding."""


def layer_run(layers: Layers, device: torch.device, arguments: argparse.Namespace) -> LayerRun:
    """A block on a device, in the dtype that is computed in."""
    return LayerRun(layers.modules[BLOCK], layers, BLOCK, device, dtype_of(arguments), None)


def inputs(layers: Layers, device: torch.device, arguments: argparse.Namespace) -> torch.Tensor:
    """What comes out of the embedding."""
    shape = (arguments.sequences, arguments.sequence, layers.modules[0].table.weight.shape[1])
    return torch.randn(shape, device=device).to(dtype_of(arguments))


@contextmanager
def beside(works: list[Callable[[], object]]) -> Iterator[None]:
    """Do each of these again and again, by a thread of its own."""
    stop = threading.Event()

    def repeat(work: Callable[[], object]) -> None:
        while not stop.is_set():
            work()

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        stop.set()
        for each in threads:
            each.join()


def same_elsewhere(
    layers: Layers, device: torch.device, arguments: argparse.Namespace
) -> Callable[[], object]:
    """A few forwards and backwards of the block on another device, until they are done."""
    run, value = layer_run(layers, device, arguments), inputs(layers, device, arguments)
    stream = make_stream(device, urgent=True)

    def work() -> None:
        with stream.use():
            for _ in range(4):
                run._backward(run._forward(as_leaves(value, True), None))
            stream.record().block()

    return work


def copies(device: torch.device, up: bool) -> Callable[[], object]:
    """A large copy to or from the host, as states are moved, until it is done."""
    nbytes = 2**29 if device.type == "cuda" else 2**20
    host = host_bytes(nbytes, pin=device.type == "cuda")
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    stream = make_stream(device)

    def work() -> None:
        with stream.use():
            copy_each([(there, host) if up else (host, there)])
            stream.record().block()

    return work


def main() -> None:
    """One condition after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cpu,cpu"
    parser.add_argument("--devices", default=default)
    parser.add_argument("--model", default="qwen3-1.7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    devices = devices_of(arguments)
    about()
    preset = PRESETS[arguments.model]
    shape = replace(preset.shape, layers=1)
    layers = Layers(
        decoder_layers(shape, rotary_base=preset.rotary_base, draw_on=devices[0])[: BLOCK + 1]
    )
    run, value = (make(layers, devices[0], arguments) for make in (layer_run, inputs))
    others = [same_elsewhere(layers, each, arguments) for each in devices[1:]]
    moving = [copies(each, up) for each in devices for up in (True, False)]
    ways: list[tuple[str, float, list[Callable[[], object]]]] = [
        ("after 0.5 s", 0.5, []),
        ("after 3 s more", 3.0, []),
        ("after 6 s more", 6.0, []),
        ("the other GPUs at the same", 1.0, others),
        ("copies both ways beside", 1.0, moving),
        ("both", 1.0, [*others, *moving]),
        ("alone again", 0.5, []),
    ]
    print(f"{'':28} {'forward':>9} {'backward':>9} {'both':>9}")
    first = 0.0
    for name, warm_s, works in ways:
        with beside(works), short_turns():
            cost, _, _ = run.measure(value, True, ADAM, arguments.repeats, False, warm_s)
        times = [each / 1e6 for each in (cost.forward_ns, cost.backward_ns)]
        first = first or sum(times)
        cells = " ".join(f"{each:9.3f}" for each in (*times, sum(times)))
        print(f"{name:28} {cells} {sum(times) / first - 1:+8.1%}", flush=True)


if __name__ == "__main__":
    main()
