"""Where each lane of a timeline lies in a picture, in pixels from the top."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import LANE_KINDS, Lane, Timeline

_COMPUTE_PX, _OTHER_PX, _GAP_PX, _GROUP_GAP_PX = 26, 16, 2, 9
_TALLEST_PX = 1500
_LARGEST_SCALE = 1.5
LANE_TITLES = {
    "compute": "compute",
    "h2d": "host to GPU",
    "d2h": "GPU to host",
    "peer": "GPU to GPU",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Group:
    """The rows of one device, or of the host (`device` -1)."""

    device: int
    top_px: int
    height_px: int

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


def lay_out(timeline: Timeline) -> Layout:
    """A row a lane that has work, devices in order and the host last.

    A device's compute lane is always there. With many devices all rows become thinner, so that a
    picture stays below about 1500 pixels as long as its rows have at least three.
    """
    groups = _grouped(timeline)
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
        placed.append(Group(device, top, at - top - _scaled(_GAP_PX, scale)))
        at += _scaled(_GROUP_GAP_PX, scale)
    return Layout(timeline.lanes, top_px, row_px, tuple(placed), at, scale < 0.75)


def _grouped(timeline: Timeline) -> dict[int, list[int]]:
    """The lanes to draw by device, in the order of LANE_KINDS; the host's group is last."""
    used = np.bincount(timeline.lane, minlength=len(timeline.lanes)) > 0
    groups: dict[int, list[int]] = {device: [] for device in (*range(timeline.devices), -1)}
    for kind in LANE_KINDS:
        for number, lane in enumerate(timeline.lanes):
            if lane.kind == kind and (used[number] or kind == "compute"):
                groups[lane.device].append(number)
    return {device: members for device, members in groups.items() if members}


def _group_px(lanes: tuple[Lane, ...], members: list[int], scale: float) -> int:
    rows = sum(_row_px(lanes[lane], scale) for lane in members)
    return rows + len(members) * _scaled(_GAP_PX, scale) + _scaled(_GROUP_GAP_PX, scale)


def _row_px(lane: Lane, scale: float) -> int:
    return max(_scaled(_COMPUTE_PX if lane.kind == "compute" else _OTHER_PX, scale), 3)


def _scaled(pixels: int, scale: float) -> int:
    return max(round(pixels * scale), 1)
