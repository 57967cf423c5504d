"""The machine that a trainer has, as a Machine: memory, links and optimizers, measured briefly."""

import time
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ..traces.machine import HOST, Device, Host, Link, Machine
from ..traces.trace import MAX_COUNT
from .masters import OptimizerFactory

COPY_BYTES = 64 * 2**20
SMALL_BYTES = 1024
SIDE = 4096
"""Of the square that is updated: with its states more than caches hold."""

REPEATS = 3


def measure_machine(
    devices: Sequence[torch.device],
    memory_bytes: Sequence[int],
    optimizer: OptimizerFactory,
    compute: torch.dtype | None = None,
) -> Machine:
    """The machine of these devices, each with so much memory (0: not limited).

    An update takes its gradient and gives its weights back in the dtype `compute`. Several virtual
    devices on one share its link to the host.
    """
    places = list(dict.fromkeys(devices))
    nodes = {place: f"bus {place}" for place in places if devices.count(place) > 1}
    updates = {place: _updates_per_s(place, optimizer, compute) for place in places}
    made, links = [], []
    for number, (device, nbytes) in enumerate(zip(devices, memory_bytes, strict=True)):
        name = f"gpu{number}"
        made.append(Device(name=name, memory_bytes=nbytes, optimizer_params_per_s=updates[device]))
        if nodes.setdefault(device, name) != name:
            links.append(_link(nodes[device], name, device, device))
    host = torch.device("cpu")
    links += [_link(HOST, nodes[place], host, place) for place in places]
    links += [_link(nodes[a], nodes[b], a, b) for a, b in combinations(places, 2)]
    rate = updates[host] if host in updates else _updates_per_s(host, optimizer, compute)
    return Machine(
        name="this machine",
        host=Host(optimizer_params_per_s=rate, sum_params_per_s=_sums_per_s(compute)),
        devices=tuple(made),
        switches=tuple(node for node in nodes.values() if node.startswith("bus ")),
        links=tuple(links),
    )


def _link(a: str, b: str, source: torch.device, target: torch.device) -> Link:
    latency_ns = _copy_ns(source, target, SMALL_BYTES)
    copy_ns = max(1, _copy_ns(source, target, COPY_BYTES) - latency_ns)
    rate = COPY_BYTES * 1_000_000_000 // copy_ns
    return Link(a=a, b=b, bytes_per_s=min(max(1, rate), MAX_COUNT), latency_ns=latency_ns)


def _copy_ns(source: torch.device, target: torch.device, nbytes: int) -> int:
    pin = source.type == "cpu" and target.type == "cuda"
    value = torch.zeros(nbytes, dtype=torch.uint8, device=source, pin_memory=pin)
    place = torch.zeros(nbytes, dtype=torch.uint8, device=target)
    return _shortest_ns(lambda: place.copy_(value, non_blocking=True), (source, target))


def _updates_per_s(
    device: torch.device, optimizer: OptimizerFactory, compute: torch.dtype | None
) -> int:
    parameter = nn.Parameter(torch.zeros(SIDE, SIDE, device=device))
    parameter.grad = torch.zeros_like(parameter)
    steps = optimizer([parameter])
    gradient = torch.zeros(SIDE, SIDE, device=device, dtype=compute)
    weights = torch.zeros_like(gradient)

    @torch.no_grad()
    def step() -> Tensor:
        if compute is not None:
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        steps.step()
        return weights.copy_(parameter) if compute is not None else parameter

    return SIDE**2 * 1_000_000_000 // max(1, _shortest_ns(step, (device,)))


def _sums_per_s(compute: torch.dtype | None) -> int:
    sums, gradient = (torch.zeros(SIDE, SIDE, dtype=compute) for _ in range(2))
    host = (torch.device("cpu"),)
    return SIDE**2 * 1_000_000_000 // max(1, _shortest_ns(lambda: sums.add_(gradient), host))


def _shortest_ns(work: Callable[[], object], devices: Sequence[torch.device]) -> int:
    """The shortest time of some runs after a first one."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(devices)
        start = time.perf_counter_ns()
        work()
        _wait(devices)
        times.append(time.perf_counter_ns() - start)
    return min(times[1:])


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
