"""A picture of loss curves: training runs laid over one another, and how far each is off."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .figure import LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save

_WIDTH_PX, _LEFT_PX, _TOP_PX, _AXES_WIDTH_PX = 1000, 90, 84, 800
_UPPER_PX, _GAP_PX, _LOWER_PX, _BELOW_PX = 280, 46, 210, 58
_COLUMNS = 2
_LABEL_PX = 15.0
_COLOURS = ("#111111", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("-", "--", "-.", ":")
_CHANCE = "#D9D9D9"

Curve = NDArray[np.float64]


def draw_losses(
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    title: str,
    about: str = "",
    *,
    chance: Sequence[Sequence[float]] = (),
    window: int = 1,
) -> None:
    """Draw one line a run, the loss of each step, and below how far it is from the first run's.

    The first is drawn widest, below the others.

    chance: more runs like the first that differ by chance alone; a grey band spans them all.
    window: steps, up to the one drawn, whose mean is drawn; the same batches make all curves
        jump alike, which hides how they lie.

    png, svg or pdf by the suffix of `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    window = max(1, min([window, *map(len, [*curves.values(), *chance])]))
    lines = {name: mean_of_last(losses, window) for name, losses in curves.items()}
    band = [mean_of_last(losses, window) for losses in chance]
    compares = len(lines) > 1 or bool(band)
    legend_px = _TOP_PX + _UPPER_PX + (_GAP_PX + _LOWER_PX if compares else 0) + _BELOW_PX
    rows = -(-(len(lines) + bool(band)) // _COLUMNS)
    page = Page.blank(_WIDTH_PX, legend_px + rows * LEGEND_ROW_PX + 14)
    page.text(14, 14, title, 18, weight="bold")
    page.text(14, 41, about, 14, color="#333333")
    axes = page.axes(_LEFT_PX, _TOP_PX, _AXES_WIDTH_PX, _UPPER_PX)
    handles = _draw(axes, lines, band, window)
    axes.set_ylabel(
        "loss" if window == 1 else f"loss, mean of\nthe last {window} steps", size=points(13)
    )
    name = next(iter(lines), "")
    if compares:
        axes.tick_params(labelbottom=False)
        below_px = _TOP_PX + _UPPER_PX + _GAP_PX
        page.text(_LEFT_PX, below_px - 28, f"the same, minus {name}: above 0 is worse", 13)
        axes = page.axes(_LEFT_PX, below_px, _AXES_WIDTH_PX, _LOWER_PX)
        apart = {each: _less(line, lines[name]) for each, line in lines.items()}
        _draw(axes, apart, [_less(each, lines[name]) for each in band], window)
        _say_ends(axes, list(apart.values()))
        axes.set_ylabel("difference", size=points(13))
    axes.set_xlabel("step", size=points(13))
    if band:
        handles.append(Patch(color=_CHANCE, label=f"{name}: {1 + len(band)} runs, apart by chance"))
    page.legend(_LEFT_PX, legend_px, handles, columns=_COLUMNS)
    save(page.figure, path)


def mean_of_last(losses: Sequence[float], window: int) -> Curve:
    """For every step from the `window`th on the mean of so many, up to it."""
    values = np.asarray(losses, dtype=np.float64)
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _less(line: Curve, first: Curve) -> Curve:
    """How much more a run's loss is than the first's, as far as both go."""
    both = min(len(line), len(first))
    return line[:both] - first[:both]


def _draw(axes: Axes, lines: Mapping[str, Curve], band: Sequence[Curve], window: int) -> list[Any]:
    """Draw lines over the band that the first makes with `band`; returns the legend's handles."""
    plain_frame(axes, keep=("left", "bottom"))
    handles = []
    for number, (name, line) in enumerate(lines.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": "-" if number == 0 else _DASHES[number % len(_DASHES)],
            "linewidth": 5.0 if number == 0 else 1.8,
            "alpha": 0.35 if number == 0 else 1.0,
        }
        axes.plot(np.arange(len(line)) + window, line, **style)
        handles.append(Line2D([], [], label=name, **style))
        if number == 0 and band:
            both = min(map(len, [line, *band]))
            spread = np.stack([each[:both] for each in [line, *band]])
            steps = np.arange(both) + window
            axes.fill_between(steps, spread.min(0), spread.max(0), color=_CHANCE, linewidth=0)
    axes.set_xlim(0, max(map(len, lines.values()), default=1) + window - 1)
    return handles


def _say_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    """Write where each line but the first ends, to its right, none over another."""
    low, high = axes.get_ylim()
    a_label = (high - low) * _LABEL_PX / _LOWER_PX
    place = -np.inf
    ends = [(line[-1], number) for number, line in enumerate(lines) if number and len(line)]
    for end, number in sorted(ends):
        place = max(float(end), place + a_label)
        axes.annotate(
            f"{end:+.3f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            size=points(13),
            color=_COLOURS[number % len(_COLOURS)],
            annotation_clip=False,
        )
