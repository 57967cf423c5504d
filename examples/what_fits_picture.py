"""The picture of `what_fits.py`: the longest context by host memory, a line a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from roundel.analysis.figure import Page, picture_path, plain_frame, points, save

COLOURS = ("#CC79A7", "#17508F", "#E69F00", "#007A5A", "#111111")
HOSTS = tuple(2**n for n in range(2, 12))
CONTEXTS = tuple(2**n for n in range(1, 8))


class Point(NamedTuple):
    """With so much host memory, in GiB, a context of so many K tokens; `ends`: the GPU is full."""

    host: float
    context: float
    ends: bool = False


def draw(panels: Mapping[str, Mapping[str, Sequence[Point]]], path: str | Path, title: str) -> None:
    """Draw a panel side by side for each way of training, in it a line a model.

    png, svg or pdf by the suffix of `path`; raises InputError for a wrong path.
    """
    path = picture_path(path)
    page = Page.blank(40 + 480 * max(2, len(panels)), 500)
    page.text(14, 14, title, 18, weight="bold")
    full = "a dot: the GPU's 24 GiB are full there, and more host memory does not help"
    about = f"simulated, plans with the least host memory; {full}"
    page.text(14, 41, about, 14, color="#333333")
    names = dict.fromkeys(name for models in panels.values() for name in models)
    colours = dict(zip(names, COLOURS, strict=False))
    for number, (name, models) in enumerate(panels.items()):
        left = 80 + 480 * number
        page.text(left, 82, name, 15)
        axes = page.axes(left, 110, 405, 310)
        _frame(axes)
        for model, line in models.items():
            colour = colours[model]
            axes.plot([each.host for each in line], [each.context for each in line], c=colour, lw=2)
            for end in (each for each in line if each.ends):
                axes.plot(end.host, end.context, "o", c=colour, ms=6)
    handles = [Line2D([], [], color=colour, lw=2, label=name) for name, colour in colours.items()]
    page.legend(80, 474, handles, columns=len(COLOURS))
    save(page.figure, path)


def _frame(axes: Axes) -> None:
    plain_frame(axes, keep=("left", "bottom"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(HOSTS[0] * 0.8, HOSTS[-1])
    axes.set_ylim(CONTEXTS[0] * 0.9, CONTEXTS[-1] * 1.1)
    axes.set_xticks(HOSTS, [str(each) for each in HOSTS])
    axes.set_yticks(CONTEXTS, [f"{each}K" for each in CONTEXTS])
    axes.grid(color="#E4E6E8")
    axes.set_xlabel("host memory, GiB", size=points(13))
    axes.set_ylabel("longest sequence, tokens", size=points(13))
