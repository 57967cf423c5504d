"""A picture of throughput: published and predicted tokens a second, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .figure import LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save
from .palette import LIMIT_COLOUR
from .units import human_rate

_WIDTH_PX, _LEFT_PX, _RIGHT_PX, _MARGIN_PX = 1000, 330, 190, 14
_AXES_PX = _WIDTH_PX - _LEFT_PX - _RIGHT_PX
_HEADING_PX, _ROW_PX, _AXIS_PX = 80, 62, 54
_TEXT_PX = 13.0
PUBLISHED_COLOUR, PREDICTED_COLOUR = "#8C8C8C", "#17508F"


class Bar(NamedTuple):
    """Tokens/s of one system. `published` None: no figure; `predicted` None: it does not fit."""

    model: str
    system: str
    devices: int
    published: float | None
    predicted: float | None


def draw_throughput(bars: Sequence[Bar], path: str | Path, title: str | None = None) -> None:
    """Draw a pair of bars a row, published above predicted, with figures and the error.

    png, svg or pdf by the suffix of `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    height = _ROW_PX * max(len(bars), 1)
    page = Page.blank(_WIDTH_PX, _HEADING_PX + height + _AXIS_PX + LEGEND_ROW_PX + _MARGIN_PX)
    heading = title or "Training throughput on RTX 4090s: measured, and predicted by Roundel"
    page.text(_MARGIN_PX, _MARGIN_PX, heading, 18, weight="bold")
    about = "tokens a second; in bold how far the prediction is off"
    page.text(_MARGIN_PX, _MARGIN_PX + 27, about, 14, color="#333333")
    axes = page.axes(_LEFT_PX, _HEADING_PX, _AXES_PX, height)
    _frame(axes, bars)
    longest = _longest(bars)
    for place, bar in enumerate(bars):
        _pair(axes, place, bar, longest)
    handles = [
        Patch(color=PUBLISHED_COLOUR, label="measured, as published (arXiv 2604.27085)"),
        Patch(color=PREDICTED_COLOUR, label="predicted"),
    ]
    page.legend(_LEFT_PX, _HEADING_PX + height + _AXIS_PX, handles, columns=2)
    save(page.figure, path)


def _longest(bars: Sequence[Bar]) -> float:
    return max([1.0, *(value or 0.0 for bar in bars for value in (bar.published, bar.predicted))])


def _frame(axes: Axes, bars: Sequence[Bar]) -> None:
    plain_frame(axes, keep=("bottom",))
    axes.set_xlim(0, _longest(bars))
    axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens/s", size=points(_TEXT_PX), labelpad=3)
    names = [f"{bar.model}, {_gpus(bar.devices)}\n{bar.system}" for bar in bars]
    axes.set_yticks(range(len(names)), names, size=points(14))
    axes.tick_params(axis="y", length=0)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _pair(axes: Axes, place: int, bar: Bar, longest: float) -> None:
    gap = longest * 7 / _AXES_PX
    size = points(_TEXT_PX)
    if bar.published is not None:
        axes.barh(place - 0.19, bar.published, 0.34, color=PUBLISHED_COLOUR)
        axes.text(
            bar.published + gap, place - 0.19, human_rate(bar.published), size=size, va="center"
        )
    lower = float(place) if bar.published is None else place + 0.19
    if bar.predicted is None:
        axes.text(gap, lower, "does not fit in memory", size=size, va="center", color=LIMIT_COLOUR)
        return
    axes.barh(lower, bar.predicted, 0.34, color=PREDICTED_COLOUR)
    figure = axes.text(
        bar.predicted + gap, lower, human_rate(bar.predicted), size=size, va="center"
    )
    if bar.published is not None:
        axes.annotate(
            f"{100 * (bar.predicted / bar.published - 1):+.1f} %",
            xy=(1, 0.5),
            xycoords=figure,
            xytext=(7, 0),
            textcoords="offset points",
            size=size,
            weight="bold",
            va="center",
            annotation_clip=False,
        )
