"""A picture of loss curves: training runs laid over one another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from .figure import LEGEND_ROW_PX, Page, picture_path, plain_frame, points, save

_WIDTH_PX, _HEIGHT_PX = 1000, 560
_LEFT_PX, _TOP_PX, _AXES_WIDTH_PX, _AXES_HEIGHT_PX = 90, 84, 870, 340
_COLOURS = ("#111111", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("-", "--", "-.", ":")


def draw_losses(
    curves: Mapping[str, Sequence[float]], path: str | Path, title: str, about: str = ""
) -> None:
    """Draw one line a run, the loss of each step; the first is drawn widest, below the others.

    png, svg or pdf by the suffix of `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    rows = -(-len(curves) // 3)
    page = Page.blank(_WIDTH_PX, _HEIGHT_PX + rows * LEGEND_ROW_PX - LEGEND_ROW_PX)
    page.text(14, 14, title, 18, weight="bold")
    page.text(14, 41, about, 14, color="#333333")
    axes = page.axes(_LEFT_PX, _TOP_PX, _AXES_WIDTH_PX, _AXES_HEIGHT_PX)
    plain_frame(axes, keep=("left", "bottom"))
    axes.set_xlabel("step", size=points(13))
    axes.set_ylabel("loss", size=points(13))
    handles = []
    for number, (name, losses) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": "-" if number == 0 else _DASHES[number % len(_DASHES)],
            "linewidth": 5.0 if number == 0 else 1.6,
            "alpha": 0.35 if number == 0 else 1.0,
        }
        axes.plot(np.arange(len(losses)), losses, **style)
        handles.append(Line2D([], [], label=name, **style))
    page.legend(_LEFT_PX, _TOP_PX + _AXES_HEIGHT_PX + 58, handles, columns=3)
    save(page.figure, path)
