"""Where each lane of a timeline lies in a picture, in pixels from the top."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import LANE_KINDS, Lane, LaneKind, Timeline

_COMPUTE_PX, _OTHER_PX, _GAP_PX, _GROUP_GAP_PX = 26, 16, 2, 9
_TALLEST_PX = 1500
_THINNEST_PX = 3
_LARGEST_SCALE = 1.5
_THIN_SCALE = 0.75
LANE_TITLES = {
    "compute": "compute",
    "h2d": "host to GPU",
    "d2h": "GPU to host",
    "peer": "GPU to GPU",
    "optimizer": "states to GPU",
}
"""Rows of a device. The host's only one is its optimizer."""


def lane_title(lane: Lane) -> str:
    """What a row is called."""
    return LANE_TITLES[lane.kind] if lane.device >= 0 else "optimizer"


@dataclass(frozen=True)
class Group:
    """The rows of one device, or of the host (`device` -1)."""

    device: int
    top_px: int
    height_px: int
    first_row_px: int

    @property
    def title(self) -> str:
        return f"GPU {self.device}" if self.device >= 0 else "host"


@dataclass(frozen=True)
class Layout:
    """Rows of a picture: `top_px[i]` and `row_px[i]` place lane i; `row_px` 0 leaves it out."""

    lanes: tuple[Lane, ...]
    top_px: NDArray[np.int64]
    row_px: NDArray[np.int64]
    groups: tuple[Group, ...]
    height_px: int
    thinned: bool

    @property
    def kinds(self) -> tuple[LaneKind, ...]:
        """The kinds of the devices' lanes that are drawn, from the top."""
        drawn = zip(self.lanes, self.row_px, strict=True)
        kinds = {lane.kind for lane, height in drawn if height and lane.device >= 0}
        return tuple(kind for kind in LANE_KINDS if kind in kinds)


def lay_out(timeline: Timeline) -> Layout:
    """A row a lane that has work, devices in order and the host last.

    A device's compute lane is always there. With many devices all rows become thinner, down to
    three pixels, to keep the picture below about 1500 pixels; where even that would need more than
    twice as much, transfer lanes are left out.
    """
    groups = _grouped(timeline, LANE_KINDS)
    if sum(len(members) for members in groups.values()) * _THINNEST_PX > 2 * _TALLEST_PX:
        groups = _grouped(timeline, ("compute", "optimizer"))
    natural = sum(_group_px(timeline.lanes, members, 1.0) for members in groups.values())
    scale = min(_LARGEST_SCALE, _TALLEST_PX / max(natural, 1))
    # A picture that would have to grow past its natural size does so only when it is small.
    scale = scale if scale < 1 else min(scale, max(1.0, 220 / max(natural, 1)))
    top_px = np.zeros(len(timeline.lanes), dtype=np.int64)
    row_px = np.zeros(len(timeline.lanes), dtype=np.int64)
    placed, at = [], _scaled(_GROUP_GAP_PX, scale)
    for device, members in groups.items():
        top = at
        for lane in members:
            row_px[lane] = _row_px(timeline.lanes[lane], scale)
            top_px[lane] = at
            at += int(row_px[lane]) + _scaled(_GAP_PX, scale)
        height = at - top - _scaled(_GAP_PX, scale)
        placed.append(Group(device, top, height, int(row_px[members[0]])))
        at += _scaled(_GROUP_GAP_PX, scale)
    return Layout(timeline.lanes, top_px, row_px, tuple(placed), at, scale < _THIN_SCALE)


def _grouped(timeline: Timeline, kinds: Sequence[LaneKind]) -> dict[int, list[int]]:
    """The lanes of these kinds to draw by device, kinds in this order; the host's group is last."""
    used = np.bincount(timeline.lane, minlength=len(timeline.lanes)) > 0
    groups: dict[int, list[int]] = {device: [] for device in (*range(timeline.devices), -1)}
    for kind in kinds:
        for number, lane in enumerate(timeline.lanes):
            if lane.kind == kind and (used[number] or kind == "compute"):
                groups[lane.device].append(number)
    return {device: members for device, members in groups.items() if members}


def _group_px(lanes: tuple[Lane, ...], members: list[int], scale: float) -> int:
    rows = sum(_row_px(lanes[lane], scale) for lane in members)
    return rows + len(members) * _scaled(_GAP_PX, scale) + _scaled(_GROUP_GAP_PX, scale)


def _row_px(lane: Lane, scale: float) -> int:
    natural = _COMPUTE_PX if lane.kind == "compute" else _OTHER_PX
    return max(_scaled(natural, scale), _THINNEST_PX)


def _scaled(pixels: int, scale: float) -> int:
    return max(round(pixels * scale), 1)
