"""The machine that a trainer has, as a Machine: memory, links and optimizers, measured briefly."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import combinations
from statistics import median

import torch
from torch import Tensor, nn

from ..policies.plan import Place
from ..traces.machine import HOST, Device, Host, Link, Machine
from .busy import kept_busy
from .masters import OptimizerFactory
from .measure_links import (
    CHANNEL,
    Copy,
    all_at_once,
    behind_one_channel,
    measured_link,
    shortest_ns,
    time_ns,
)
from .measure_tasks import task_ns
from .places import threads, threads_of_updates

SIDE = 4096
"""Of the square that is updated: with its states more than caches hold."""

SQUARES = 3
"""So many are updated in turn, each where in memory it may be."""

IN_A_ROW = 8
"""Updates that are launched on a GPU one behind the other, as among ops: to launch a single one,
and to wait for it, takes about as long as it does."""

SUMS = 4
"""Pairs of such squares that are summed in turn: gradients come from memory, not from caches."""

BRIEFLY_S = 0.1
"""How long work on the host is timed, again and again, beside GPUs that are busy, where it is to
be measured briefly; `THOROUGHLY_S` where not.

Its time depends on which cores its threads have got, and on what the GPUs are copying just then:
moments of it were up to 60 % apart.
"""

THOROUGHLY_S = 0.5


def measure_machine(
    devices: Sequence[torch.device],
    memory_bytes: Sequence[int],
    optimizer: OptimizerFactory,
    compute: torch.dtype | None = None,
    *,
    weights: torch.dtype = torch.float32,
    updates_on: Collection[Place] = ("host", "device"),
    host_memory_bytes: int = 0,
    timed_s: float = BRIEFLY_S,
) -> Machine:
    """The machine of these devices, each with so much memory, and the host (0: not limited).

    An update changes weights of the dtype `weights`. Where `compute` is another dtype, it takes its
    gradient and gives its weights back in that; elsewhere than in `updates_on` it is not measured,
    and takes no time.
    On the host it is measured for `timed_s` while the GPUs are busy, as they are in a step.
    Several virtual devices on one share its link to the host.
    """
    host = torch.device("cpu")
    places = list(dict.fromkeys(devices))
    nodes = {place: f"bus {place}" for place in places if devices.count(place) > 1}
    update = partial(_update, optimizer, compute, weights)
    updates = dict.fromkeys([*places, host], 0)
    if "device" in updates_on:
        updates |= {each: _per_s(_in_a_row_ns(update(each), each)) for each in places}
    with threads(threads_of_updates(devices)), kept_busy(devices):
        if "host" in updates_on:
            updates[host] = _per_s(_usual_ns(lambda: update(host), SQUARES, timed_s))
        sums = _per_s(_usual_ns(lambda: _sum(compute), SUMS, timed_s))
    made, links = [], []
    for number, (device, nbytes) in enumerate(zip(devices, memory_bytes, strict=True)):
        name = f"gpu{number}"
        made.append(Device(name=name, memory_bytes=nbytes, optimizer_params_per_s=updates[device]))
        if nodes.setdefault(device, name) != name:
            links.append(measured_link(nodes[device], name, device, device))
    to_host = [measured_link(HOST, nodes[place], host, place) for place in places]
    to_host = behind_one_channel(to_host, all_at_once(places))
    links += to_host
    links += [measured_link(nodes[a], nodes[b], a, b) for a, b in combinations(places, 2)]
    return Machine(
        name="this machine",
        host=Host(
            memory_bytes=host_memory_bytes,
            optimizer_params_per_s=updates[host],
            sum_params_per_s=sums,
            task_ns=task_ns(devices[0]),
        ),
        devices=tuple(made),
        switches=switches_of(nodes, to_host),
        links=tuple(links),
    )


def switches_of(nodes: dict[torch.device, str], to_host: list[Link]) -> tuple[str, ...]:
    """The nodes that only pass data on."""
    buses = tuple(node for node in nodes.values() if node.startswith("bus "))
    return (*buses, CHANNEL) if any(link.b == CHANNEL for link in to_host) else buses


def _update(
    optimizer: OptimizerFactory,
    compute: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Copy:
    parameter = nn.Parameter(torch.zeros(SIDE, SIDE, device=device, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    steps = optimizer([parameter])
    if compute in (None, dtype):

        def step() -> Tensor:
            steps.step()
            return parameter

        return step
    gradient = torch.ones(SIDE, SIDE, device=device, dtype=compute)
    weights = torch.ones_like(gradient)

    @torch.no_grad()
    def converting() -> Tensor:
        parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        steps.step()
        return weights.copy_(parameter)

    return converting


def _in_a_row_ns(update: Copy, device: torch.device) -> int:
    """The time of one of several updates on a device."""
    count = IN_A_ROW if device.type == "cuda" else 1
    return shortest_ns([update] * count, (device,)) // count


def _sum(compute: torch.dtype | None) -> Copy:
    # Of zeros the system makes no pages before they are written to: they would cost nothing.
    sums, gradient = (torch.ones(SIDE, SIDE, dtype=compute) for _ in range(2))
    return lambda: sums.add_(gradient)


def _usual_ns(make: Callable[[], Copy], most: int, timed_s: float) -> int:
    """The median time of work on the host: others may hold it up."""
    return round(median(times_in_turn_ns(make, most, timed_s)))


def times_in_turn_ns(make: Callable[[], Copy], most: int, timed_s: float) -> list[int]:
    """How long work on the host takes, again and again for so long, of at most so many of its kind
    in turn."""
    works, times = list[Copy](), list[int]()
    while sum(times) < timed_s * 1e9:
        if len(works) < most:
            works.append(make())
            works[-1]()
        times.append(time_ns([works[len(times) % len(works)]], ()))
    return times


def _per_s(nanoseconds: int) -> int:
    return SIDE**2 * 1_000_000_000 // max(1, nanoseconds)
