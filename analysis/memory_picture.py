"""A picture of memory over time: a panel a device and one for the host, limits drawn."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ..traces.timeline import MemoryCurve, Timeline
from .figure import LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save
from .palette import LIMIT_COLOUR
from .units import byte_unit, human_bytes, shortened, time_unit

_WIDTH_PX, _MARGIN_PX, _HEADING_PX = 1400, 14, 66
_LEFT_PX, _RIGHT_PX, _GAP_PX, _TITLE_PX, _AXIS_PX = 72, 24, 26, 24, 48
_PANEL_PX = {1: 240, 2: 120, 4: 110, 8: 84}
_USED_COLOUR, _USED_FILL = "#1F5FA6", "#C9DDF2"
_DASHES = (0, (5, 3))
_TEXT_PX = 13.0
_NARROW_PX = 250
_MOST_PANELS = 64
_POINTS_PER_PX = 2


def draw_memory(timeline: Timeline, path: str | Path, title: str | None = None) -> None:
    """Draw the memory in use on every device and the host, with limits and peaks.

    Up to 64 devices have a panel each; of more, the 64 with the highest peaks are drawn, and the
    picture says so. Curves are thinned to about two points a pixel, without losing an extreme.
    png, svg or pdf by the suffix of `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    devices, host = _chosen(timeline), timeline.memory[timeline.devices :]
    grid = _Grid.of(len(devices), len(host))
    page = Page.blank(_WIDTH_PX, grid.height_px)
    page.text(_MARGIN_PX, _MARGIN_PX, _title(timeline, title), 18, weight="bold")
    page.text(_MARGIN_PX, _MARGIN_PX + 27, _summary(timeline, devices), 14, color="#333333")
    _panels(page, grid, devices, timeline.makespan_ns)
    for curve in host:
        axes = page.axes(_LEFT_PX, grid.host_px, _WIDTH_PX - _LEFT_PX - _RIGHT_PX, grid.panel_px)
        _panel(axes, curve, timeline.makespan_ns, _extent([curve]), left=True, bottom=True)
    page.legend(_LEFT_PX, grid.height_px - _MARGIN_PX - LEGEND_ROW_PX, _legend_handles(), columns=3)
    save(page.figure, path)


def _legend_handles() -> list[Artist]:
    peak = Line2D([], [], color=_USED_COLOUR, linestyle="none", marker="o", label="peak")
    peak.set_markersize(points(7))
    return [
        Patch(facecolor=_USED_FILL, edgecolor=_USED_COLOUR, label="memory in use"),
        peak,
        Line2D([], [], color=LIMIT_COLOUR, linestyle=_DASHES, linewidth=points(1.5), label="limit"),
    ]


@dataclass(frozen=True)
class _Grid:
    """Where the panels lie: `columns` of equal width, rows of equal height, the host below."""

    columns: int
    rows: int
    panel_px: int
    hosts: int

    @classmethod
    def of(cls, devices: int, hosts: int) -> "_Grid":
        columns = 1 if devices <= 2 else 2 if devices <= 8 else 4 if devices <= 16 else 8
        return cls(columns, ceil(devices / columns), _PANEL_PX[columns], hosts)

    @property
    def width_px(self) -> float:
        free = _WIDTH_PX - _LEFT_PX - _RIGHT_PX - (self.columns - 1) * _GAP_PX
        return free / self.columns

    def corner(self, number: int) -> tuple[float, float]:
        """The top left corner of panel `number`."""
        row, column = divmod(number, self.columns)
        left = _LEFT_PX + column * (self.width_px + _GAP_PX)
        return left, _HEADING_PX + _TITLE_PX + row * (self.panel_px + _TITLE_PX)

    @property
    def host_px(self) -> int:
        devices = self.rows * (self.panel_px + _TITLE_PX) + (_AXIS_PX if self.rows else 0)
        return _HEADING_PX + _TITLE_PX + devices

    @property
    def height_px(self) -> int:
        host = self.hosts * (self.panel_px + _AXIS_PX)
        return self.host_px + host + LEGEND_ROW_PX + 2 * _MARGIN_PX


def thinned(curve: MemoryCurve, buckets: int, extent_ns: int) -> tuple[NDArray[np.int64], ...]:
    """Times and bytes of `curve` as steps, at most four points in each of `buckets` times.

    Of each bucket the first, lowest, highest and last point stay, so no extreme is lost.
    """
    time, used = curve.time_ns.astype(np.int64), curve.used_bytes.astype(np.int64)
    if len(time) <= 4 * buckets:
        return time, used
    bucket = np.clip(time * buckets // max(extent_ns, 1), 0, buckets)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    ends = np.append(starts[1:], len(time)) - 1
    by_size = np.lexsort((used, bucket))
    keep = np.unique(np.concatenate([starts, ends, by_size[starts], by_size[ends]]))
    return time[keep], used[keep]


def _chosen(timeline: Timeline) -> list[MemoryCurve]:
    """The devices to draw, in order: all of them, or those with the highest peaks."""
    devices = timeline.memory[: timeline.devices]
    peaks = np.array([curve.peak_bytes for curve in devices])
    highest = np.argsort(-peaks, kind="stable")[:_MOST_PANELS]
    return [devices[number] for number in np.sort(highest).tolist()]


def _title(timeline: Timeline, title: str | None) -> str:
    return shortened(title or f"Memory over time: {timeline.name}", 110)


def _summary(timeline: Timeline, drawn: list[MemoryCurve]) -> str:
    """The highest peak and whether everything fits, in one line."""
    if not timeline.memory:
        return "no memory was recorded"
    parts: list[str] = [timeline.source]
    if drawn:
        highest = max(drawn, key=lambda curve: curve.peak_bytes)
        parts.append(f"highest GPU peak {human_bytes(highest.peak_bytes)} on {highest.name}")
    over = max(timeline.memory, key=lambda curve: curve.over_bytes)
    fits = "everything fits"
    if over.over_bytes:
        fits = f"does not fit: {over.name} is {human_bytes(over.over_bytes)} over its limit"
    parts.append(fits)
    if len(drawn) < timeline.devices:
        parts.append(f"{timeline.devices} GPUs, the {len(drawn)} fullest are drawn")
    return "   ·   ".join(parts)


def _panels(page: Page, grid: _Grid, devices: list[MemoryCurve], extent_ns: int) -> None:
    extent = _extent(devices)
    for number, curve in enumerate(devices):
        left, top = grid.corner(number)
        axes = page.axes(left, top, grid.width_px, grid.panel_px)
        below = number + grid.columns >= len(devices)
        _panel(axes, curve, extent_ns, extent, left=number % grid.columns == 0, bottom=below)


def _extent(curves: list[MemoryCurve]) -> int:
    """How high panels are, in bytes: room for every peak and limit."""
    return max([1, *(max(curve.peak_bytes, curve.limit_bytes) for curve in curves)])


def _panel(
    axes: Axes, curve: MemoryCurve, extent_ns: int, extent: int, left: bool, bottom: bool
) -> None:
    """One memory: its curve, its limit, its peak, and its name above it."""
    plain_frame(axes, keep=("left", "bottom"))
    factor_ns, time_name = time_unit(extent_ns)
    factor, byte_name = byte_unit(extent)
    width_px = round(axes.get_position().width * _WIDTH_PX)
    time, used = thinned(curve, width_px * _POINTS_PER_PX, extent_ns)
    x = np.append(time, extent_ns) / factor_ns
    y = np.append(used, used[-1:] if len(used) else 0) / factor
    axes.fill_between(x, y, step="post", color=_USED_FILL, linewidth=0, zorder=1)
    axes.plot(x, y, drawstyle="steps-post", color=_USED_COLOUR, linewidth=points(1.3), zorder=2)
    axes.set_xlim(0, max(extent_ns, 1) / factor_ns)
    axes.set_ylim(0, extent * 1.12 / factor)
    _limit_and_peak(axes, curve, factor_ns, factor)
    colour = LIMIT_COLOUR if curve.over_bytes else "black"
    text = _panel_title(curve, narrow=width_px < _NARROW_PX)
    axes.set_title(text, loc="left", size=points(_TEXT_PX), pad=4, color=colour)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if left:
        axes.set_ylabel(byte_name, size=points(_TEXT_PX))
    else:
        axes.set_yticklabels([])
    if bottom:
        axes.set_xlabel(f"time ({time_name})", size=points(_TEXT_PX), labelpad=2)
    else:
        axes.set_xticklabels([])


def _panel_title(curve: MemoryCurve, narrow: bool) -> str:
    peak = human_bytes(curve.peak_bytes)
    if narrow:
        return f"{curve.name}: {peak}"
    over = f", {human_bytes(curve.over_bytes)} over its limit" if curve.over_bytes else ""
    return f"{curve.name}: peak {peak}{over}"


def _limit_and_peak(axes: Axes, curve: MemoryCurve, factor_ns: int, factor: int) -> None:
    if curve.limit_bytes:
        height = curve.limit_bytes / factor
        axes.axhline(height, color=LIMIT_COLOUR, linewidth=points(1.5), linestyle=_DASHES, zorder=3)
    peak = (curve.peak_ns / factor_ns, curve.peak_bytes / factor)
    colour = LIMIT_COLOUR if curve.over_bytes else _USED_COLOUR
    axes.plot(*peak, marker="o", markersize=points(7), color=colour, clip_on=False, zorder=4)
