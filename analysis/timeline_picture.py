"""Pictures of timelines: what every lane does and when, idle time left white."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..traces.timeline import KINDS, Timeline
from .boxes import draw_boxes, is_crowded
from .figure import LEGEND_PX, LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save
from .idle import ComputeRows
from .layout import LANE_TITLES, Layout, lane_title, lay_out
from .metrics import measure
from .palette import BACKGROUND, COLOURS, LEGEND_ORDER, MEANINGS, MEANINGS_IN_TRANSIT
from .units import counted, human_rate, human_seconds, human_share, shortened, time_unit

_WIDTH_PX, _LEFT_PX, _RIGHT_PX = 1400, 152, 24
_AXES_PX = _WIDTH_PX - _LEFT_PX - _RIGHT_PX
_MARGIN_PX, _HEADING_PX, _NOTE_PX, _TIME_AXIS_PX, _STEP_MARK_PX = 12, 54, 22, 50, 16
_PANEL_GAP_PX = 20
_LEGEND_COLUMNS = 6
_MOST_STEP_MARKS = 12


def draw_timeline(timeline: Timeline, path: str | Path, title: str | None = None) -> None:
    """Draw `timeline` as png, svg or pdf (by the suffix of `path`), 1400 pixels wide.

    A row a lane, a box a task, its colour the kind, its number the microbatch. `title` None means
    the timeline's name. With many devices the rows become thinner, and beyond 20,000 tasks narrow
    ones become pixels; the picture says so. Raises InputError for a wrong path.
    """
    _draw([timeline], [title], picture_path(path))


def draw_pair(above: Timeline, below: Timeline, path: str | Path) -> None:
    """Draw two timelines one above the other on one time axis, as `draw_timeline` does."""
    _draw([above, below], [None, None], picture_path(path))


def _draw(timelines: Sequence[Timeline], titles: Sequence[str | None], path: Path) -> None:
    panels = [_Panel(timeline, lay_out(timeline)) for timeline in timelines]
    extent_ns = max(1, *(timeline.makespan_ns for timeline in timelines))
    handles = _legend_handles(panels)
    legend_px = -(-len(handles) // _LEGEND_COLUMNS) * LEGEND_ROW_PX
    gaps_px = (len(panels) - 1) * _PANEL_GAP_PX
    height_px = sum(panel.height_px for panel in panels) + gaps_px + _TIME_AXIS_PX + legend_px
    page = Page.blank(_WIDTH_PX, height_px + 2 * _MARGIN_PX)
    top = _MARGIN_PX
    for panel, title in zip(panels, titles, strict=True):
        last = panel is panels[-1]
        _draw_panel(page, top, panel, title, extent_ns, labelled=last)
        top += panel.height_px + (_TIME_AXIS_PX if last else _PANEL_GAP_PX)
    page.legend(_LEFT_PX, top, handles, _LEGEND_COLUMNS)
    save(page.figure, path)


@dataclass(frozen=True)
class _Panel:
    """One timeline of a picture, with its heading above it and its note below it."""

    timeline: Timeline
    layout: Layout

    @property
    def heading_px(self) -> int:
        return _HEADING_PX + (_STEP_MARK_PX if self.marks_steps else 0)

    @property
    def marks_steps(self) -> bool:
        return 2 <= self.timeline.steps <= _MOST_STEP_MARKS

    @property
    def kinds(self) -> set[str]:
        """The kinds of the tasks that are drawn."""
        drawn = self.layout.row_px[self.timeline.lane] > 0
        return {KINDS[code] for code in np.unique(self.timeline.kind[drawn]).tolist()}

    @property
    def notes(self) -> str:
        """What a reader must know about how this one is drawn."""
        notes = []
        if self.layout.thinned:
            rows = ", ".join(LANE_TITLES[kind] for kind in self.layout.kinds)
            notes.append(f"{self.timeline.devices} GPUs, rows drawn thin; each GPU's are: {rows}")
        if is_crowded(self.timeline, _AXES_PX):
            count = f"{len(self.timeline):,} tasks"
            notes.append(
                f"{count}: narrow ones share a pixel by time, short transfers take a whole one"
            )
        return "; ".join(notes)

    @property
    def height_px(self) -> int:
        return self.heading_px + self.layout.height_px + (_NOTE_PX if self.notes else 8)


def _draw_panel(
    page: Page, top_px: int, panel: _Panel, title: str | None, extent_ns: int, labelled: bool
) -> None:
    """Draw one timeline below `top_px`; its axes' units are pixels."""
    timeline, layout = panel.timeline, panel.layout
    axes_px = top_px + panel.heading_px
    axes = page.axes(_LEFT_PX, axes_px, _AXES_PX, layout.height_px)
    axes.set_facecolor(BACKGROUND)
    axes.set_autoscale_on(False)
    px_per_ns = _AXES_PX / extent_ns
    numbered = draw_boxes(axes, timeline, layout, px_per_ns, _AXES_PX)
    _heading(page, top_px, timeline, title, numbered)
    axes.set_xlim(0, _AXES_PX)
    axes.set_ylim(layout.height_px, 0)
    _row_titles(axes, layout)
    if panel.marks_steps:
        _step_marks(axes, timeline, px_per_ns)
    _time_axis(axes, extent_ns, labelled)
    note_px = axes_px + layout.height_px + (_TIME_AXIS_PX if labelled else 4)
    page.text(_LEFT_PX, note_px, panel.notes, LEGEND_PX, color="#555555", style="italic")


def _heading(
    page: Page, top_px: int, timeline: Timeline, title: str | None, numbered: bool
) -> None:
    metrics = measure(timeline)
    counts = f"{counted(timeline.microbatches, 'microbatch')} a step"
    counts += ", numbered in boxes that have room" if numbered else ""
    figures = [
        timeline.source,
        f"{counted(timeline.devices, 'GPU')}, {counts}",
        f"step {human_seconds(metrics.step_s)}",
        f"bubble {human_share(metrics.bubble_ratio)}",
        f"{human_rate(metrics.tokens_per_s)} tokens/s",
    ]
    if not metrics.fits:
        figures.append("does not fit in memory")
    name = shortened(title or timeline.name, 110)
    page.text(_MARGIN_PX, top_px, name, 18, weight="bold")
    page.text(_MARGIN_PX, top_px + 26, "   ·   ".join(figures), 14, color="#333333")


def _row_titles(axes: Axes, layout: Layout) -> None:
    """Name the devices and, where rows are high enough, their lanes, left of the axes."""
    plain_frame(axes)
    axes.set_yticks([])
    named = not layout.thinned
    every = _every(layout)
    for number, group in enumerate(layout.groups):
        y = group.top_px + (group.first_row_px if named else group.height_px) / 2
        if number % every == 0 or group.device < 0:
            x = -(_LEFT_PX - _MARGIN_PX) if named else -8
            place = "left" if named else "right"
            _title(axes, x, y, group.title, 13, ha=place, weight="bold")
    for lane, top, height in zip(layout.lanes, layout.top_px, layout.row_px, strict=True):
        if named and height:
            _title(axes, -8, top + height / 2, lane_title(lane), 12, ha="right")


def _every(layout: Layout) -> int:
    """Only every so many devices get a title, so that titles do not run into each other."""
    pitch_px = layout.height_px / max(len(layout.groups), 1)
    return max(1, int(np.ceil(14 / pitch_px)))


def _title(axes: Axes, x: float, y: float, text: str, size_px: float, **style: Any) -> None:
    axes.text(x, y, text, size=points(size_px), va="center_baseline", clip_on=False, **style)


def _step_marks(axes: Axes, timeline: Timeline, px_per_ns: float) -> None:
    """A dashed line where each step's compute ends on all devices."""
    for step, end_ns in enumerate(ComputeRows.of(timeline).step_ends_ns().tolist()):
        x = end_ns * px_per_ns
        axes.axvline(x, color="#B3261E", linewidth=points(1.2), linestyle=(0, (4, 3)), zorder=4)
        text = f"end of step {step} "
        axes.text(x, -2, text, size=points(12), color="#B3261E", ha="right", va="bottom")


def _time_axis(axes: Axes, extent_ns: int, labelled: bool) -> None:
    factor, unit = time_unit(extent_ns)
    locator = MaxNLocator(nbins=12, steps=[1, 2, 2.5, 5, 10])
    times = np.asarray(locator.tick_values(0, extent_ns / factor))
    times = times[(times >= 0) & (times * factor <= extent_ns)]
    axes.set_xticks(times * factor * _AXES_PX / extent_ns)
    if labelled:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda _, place: f"{times[place or 0]:g}"))
        axes.set_xlabel(f"time ({unit})", size=points(13), labelpad=2)
    else:
        axes.set_xticklabels([])


def _legend_handles(panels: Sequence[_Panel]) -> list[Patch]:
    present = {kind for panel in panels for kind in panel.kinds}
    transit = any("optimizer" in panel.layout.kinds for panel in panels)
    meanings = MEANINGS | (MEANINGS_IN_TRANSIT if transit else {})
    # matplotlib fills a legend column by column; people read this one in rows.
    kinds = _by_rows([kind for kind in LEGEND_ORDER if kind in present], _LEGEND_COLUMNS)
    return [
        Patch(facecolor=COLOURS[kind], label=meanings[kind], ec="#333333", lw=points(0.7))
        for kind in kinds
    ]


def _by_rows(items: list[str], columns: int) -> list[str]:
    return [item for column in range(columns) for item in items[column::columns]]
