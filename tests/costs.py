"""Small traces and machines for tests. Forward, input-backward and weight-backward all differ."""

from collections.abc import Sequence

from roundel.policies.work import Work
from roundel.traces.machine import Device, Host, Link, Machine, ideal_machine
from roundel.traces.trace import LayerCost, Trace


def make_trace(layers: int | Sequence[tuple[int, int, int]], **fields: int) -> Trace:
    """A trace from (forward, input-backward, weight-backward) per layer, or of equal layers."""
    times = [(10, 13, 7)] * layers if isinstance(layers, int) else layers
    return Trace(
        name="test",
        device="test",
        provenance="test",
        microbatch_tokens=1,
        layers=tuple(
            LayerCost(
                name=f"layer.{number}",
                forward_ns=forward,
                backward_ns=inputs + weights,
                backward_input_ns=inputs,
                backward_weight_ns=weights,
                **fields,
            )
            for number, (forward, inputs, weights) in enumerate(times)
        ),
    )


def make_work(
    layers: int | Sequence[tuple[int, int, int]],
    devices: int,
    microbatches: int,
    hop_ns: int = 0,
    **fields: int,
) -> Work:
    """Work on an ideal machine."""
    return Work(make_trace(layers, **fields), ideal_machine(devices, hop_ns), microbatches)


def make_machine(
    devices: int,
    bytes_per_s: int = 10**9,
    *,
    host_bytes_per_s: int = 0,
    memory_bytes: int = 0,
    params_per_s: int = 0,
    latency_ns: int = 0,
) -> Machine:
    """Devices on a switch with the host; 1 byte a nanosecond, the host's link wide enough."""
    host_rate = host_bytes_per_s or bytes_per_s * devices
    ends = [("host", host_rate), *((f"gpu{number}", bytes_per_s) for number in range(devices))]
    return Machine(
        name="test",
        host=Host(optimizer_params_per_s=params_per_s),
        devices=tuple(
            Device(
                name=f"gpu{number}", memory_bytes=memory_bytes, optimizer_params_per_s=params_per_s
            )
            for number in range(devices)
        ),
        switches=("switch",),
        links=tuple(
            Link(a=end, b="switch", bytes_per_s=rate, latency_ns=latency_ns) for end, rate in ends
        ),
    )
