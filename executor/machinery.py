"""Machinery: what outlives a step, and the threads that its tasks run in."""

from collections.abc import Mapping, Sequence

import torch

from ..policies.builder import lanes_of
from ..traces.timeline import Lane
from .compute import Computer, Randomness
from .gradients import Scratch
from .host_pool import HostPool
from .lanes import LaneThread
from .layers import Layers
from .masters import Masters
from .placement import Placed
from .places import gpus_of, threads_of_updates
from .streams import CpuStream, make_stream
from .transit import Transit


class Machinery:
    """Devices, weights on them, masters, and what uploads read.

    `streams` are the devices' compute streams. States that pass through are updated there, or on
    `update_streams`.
    """

    def __init__(
        self,
        layers: Layers,
        devices: list[torch.device],
        computers: list[Computer],
        masters: Masters,
        placed: Placed,
        clip_norm: float | None,
        lanes: Mapping[Lane, LaneThread],
        randomness: Randomness,
    ) -> None:
        pin = bool(gpus_of(devices))
        self.layers = layers
        self.devices = devices
        self.computers = computers
        self.weights, self.host_copies = placed
        self.masters = masters
        self.clip_norm = clip_norm
        self.streams, self.update_streams = (
            [thread.stream for lane, thread in lanes.items() if lane.kind == kind]
            for kind in ("compute", "d2h")
        )
        self.randomness = randomness
        self.scratch = Scratch()
        self.sharing = [layers.sharing(layer) for layer in range(len(layers))]
        self.transit = Transit(layers, masters, self.host_copies, pin)
        self.on_host = HostPool(pin)


def lane_threads(devices: Sequence[torch.device]) -> dict[Lane, LaneThread]:
    """A thread for each lane of a program on these devices, in the program's order."""
    return {lane: _thread(lane, devices) for lane in lanes_of(len(devices))}


def _thread(lane: Lane, devices: Sequence[torch.device]) -> LaneThread:
    if lane.device < 0:
        return LaneThread(lane.name, CpuStream(), threads=threads_of_updates(devices))
    # What the ops do not wait for, such as updates, leaves them the GPU.
    stream = make_stream(devices[lane.device], urgent=lane.kind == "compute")
    return LaneThread(lane.name, stream, blocks=lane.kind in ("h2d", "optimizer"))
