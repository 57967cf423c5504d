"""The machine that a trainer has, as a Machine: memory, links and optimizers, measured briefly."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ..traces.machine import HOST, Device, Host, Link, Machine
from .masters import OptimizerFactory
from .measure_links import (
    CHANNEL,
    all_at_once_bytes_per_s,
    behind_one_channel,
    measured_link,
    shortest_ns,
)

SIDE = 4096
"""Of the square that is updated: with its states more than caches hold."""


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
            links.append(measured_link(nodes[device], name, device, device))
    host = torch.device("cpu")
    to_host = [measured_link(HOST, nodes[place], host, place) for place in places]
    to_host = behind_one_channel(to_host, all_at_once_bytes_per_s(places))
    links += to_host
    links += [measured_link(nodes[a], nodes[b], a, b) for a, b in combinations(places, 2)]
    rate = updates[host] if host in updates else _updates_per_s(host, optimizer, compute)
    return Machine(
        name="this machine",
        host=Host(optimizer_params_per_s=rate, sum_params_per_s=_sums_per_s(compute)),
        devices=tuple(made),
        switches=switches_of(nodes, to_host),
        links=tuple(links),
    )


def switches_of(nodes: dict[torch.device, str], to_host: list[Link]) -> tuple[str, ...]:
    """The nodes that only pass data on."""
    buses = tuple(node for node in nodes.values() if node.startswith("bus "))
    return (*buses, CHANNEL) if any(link.b == CHANNEL for link in to_host) else buses


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

    return SIDE**2 * 1_000_000_000 // max(1, shortest_ns([step], (device,)))


def _sums_per_s(compute: torch.dtype | None) -> int:
    sums, gradient = (torch.zeros(SIDE, SIDE, dtype=compute) for _ in range(2))
    host = (torch.device("cpu"),)
    return SIDE**2 * 1_000_000_000 // max(1, shortest_ns([lambda: sums.add_(gradient)], host))
