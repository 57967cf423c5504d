"""A picture of bubble ratios: how much of the GPUs' time is idle under each policy, and why."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .figure import LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save
from .metrics import Metrics
from .palette import BUBBLE_COLOURS, BUBBLE_MEANINGS, LIMIT_COLOUR, ink_on
from .units import counted, human_seconds, human_share, shortened

_WIDTH_PX, _LEFT_PX, _RIGHT_PX, _MARGIN_PX = 1200, 210, 330, 14
_AXES_PX = _WIDTH_PX - _LEFT_PX - _RIGHT_PX
_HEADING_PX, _BAR_PX, _AXIS_PX = 76, 46, 54
_FIGURE_PX = 13.0
_HATCH = "////"
_NEEDED_PX = 46


def draw_bubbles(
    metrics: Mapping[str, Metrics], path: str | Path, title: str | None = None
) -> None:
    """Draw one stacked bar a policy: the parts of its bubble ratio, with figures.

    Policies that do not fit in memory are hatched and say so. png, svg or pdf by the suffix of
    `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    bars_px = _BAR_PX * max(len(metrics), 1)
    page = Page.blank(_WIDTH_PX, _HEADING_PX + bars_px + _AXIS_PX + 2 * LEGEND_ROW_PX + _MARGIN_PX)
    page.text(_MARGIN_PX, _MARGIN_PX, title or "Idle time of the GPUs by policy", 18, weight="bold")
    about = "share of all GPUs' time up to the end, by what each GPU was waiting for"
    if metrics:
        about += f"; {counted(next(iter(metrics.values())).steps, 'step')}"
    page.text(_MARGIN_PX, _MARGIN_PX + 27, about, 14, color="#333333")
    axes = page.axes(_LEFT_PX, _HEADING_PX, _AXES_PX, bars_px)
    _bars(axes, metrics)
    _names(axes, metrics)
    handles = [Patch(color=colour, label=BUBBLE_MEANINGS[part]) for part, colour in _parts()]
    page.legend(_LEFT_PX, _HEADING_PX + bars_px + _AXIS_PX, handles, columns=2)
    save(page.figure, path)


def _parts() -> list[tuple[str, str]]:
    return list(BUBBLE_COLOURS.items())


def _bars(axes: Axes, metrics: Mapping[str, Metrics]) -> None:
    """The stacked bars, their figures and what stands at their ends."""
    plain_frame(axes, keep=("bottom",))
    longest = max([0.01, *(figures.bubble_ratio for figures in metrics.values())])
    axes.set_xlim(0, longest)
    axes.set_ylim(max(len(metrics), 1) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set_xlabel("bubble ratio", size=points(_FIGURE_PX), labelpad=3)
    places = np.arange(len(metrics))
    left = np.zeros(len(metrics))
    for part, colour in _parts():
        share = np.array([getattr(figures.bubble, part) for figures in metrics.values()])
        hatches = ["" if figures.fits else _HATCH for figures in metrics.values()]
        edge = ink_on(colour)
        axes.barh(places, share, 0.66, left, color=colour, hatch=hatches, ec=edge, lw=0.0)
        _shares_on_bars(axes, share, left, longest, colour)
        left = left + share
    for place, figures in enumerate(metrics.values()):
        _figures_at_end(axes, place, figures, longest)


def _shares_on_bars(
    axes: Axes,
    share: np.typing.NDArray[np.float64],
    left: np.typing.NDArray[np.float64],
    longest: float,
    colour: str,
) -> None:
    """A figure on each part that is wide enough for it."""
    for place in np.flatnonzero(share / longest * _AXES_PX >= _NEEDED_PX).tolist():
        axes.text(
            left[place] + share[place] / 2,
            place,
            human_share(share[place]),
            ha="center",
            va="center_baseline",
            size=points(_FIGURE_PX),
            color=ink_on(colour),
            # Ground under the figure, so that a hatch does not run through it.
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        )


def _figures_at_end(axes: Axes, place: int, figures: Metrics, longest: float) -> None:
    """The whole ratio in bold after the bar, then the step's time, and whether it fits."""
    x = figures.bubble_ratio + longest * 8 / _AXES_PX
    size = points(_FIGURE_PX)
    whole = axes.text(
        x, place, human_share(figures.bubble_ratio), size=size, weight="bold", va="center_baseline"
    )
    text, colour = f"step {human_seconds(figures.step_s)}", "#333333"
    if not figures.fits:
        text, colour = f"{text}, does not fit in memory", LIMIT_COLOUR
    axes.annotate(
        text,
        xy=(1, 0.5),
        xycoords=whole,
        xytext=(7, 0),
        textcoords="offset points",
        size=size,
        color=colour,
        va="center",
        annotation_clip=False,
    )


def _names(axes: Axes, metrics: Mapping[str, Metrics]) -> None:
    names = [shortened(policy, 24) for policy in metrics]
    axes.set_yticks(np.arange(len(names)), names, size=points(14))
    axes.tick_params(axis="y", length=0)
