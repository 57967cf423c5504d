"""Figures laid out in pixels, and saved without pyplot: no window, no global state."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .files import PICTURES, output_path, writing

DPI = 100
# What would make two pictures of one timeline differ: the date of drawing.
_UNDATED: dict[str, dict[str, str | None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def picture_path(path: str | Path) -> Path:
    """`path`, ready for a picture. Raises InputError for another suffix than png, svg or pdf."""
    return output_path(path, "picture", PICTURES)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as its suffix says. Raises InputError where the system refuses."""
    with writing(path, "picture"):
        figure.savefig(path, dpi=DPI, metadata=_UNDATED[path.suffix.lower()])


def points(pixels: float) -> float:
    """Pixels as points, which is what matplotlib counts text and lines in."""
    return pixels * 72 / DPI


@dataclass(frozen=True)
class Page:
    """A white figure whose parts are placed in pixels from its top left corner."""

    figure: Figure
    width_px: int
    height_px: int

    @classmethod
    def blank(cls, width_px: int, height_px: int) -> "Page":
        """An empty page of this size."""
        figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        return cls(figure, width_px, height_px)

    def axes(self, left_px: float, top_px: float, width_px: float, height_px: float) -> Axes:
        """Axes that fill this rectangle exactly."""
        bottom = 1 - (top_px + height_px) / self.height_px
        rectangle = (left_px / self.width_px, bottom)
        size = (width_px / self.width_px, height_px / self.height_px)
        return self.figure.add_axes((*rectangle, *size))

    def text(self, left_px: float, top_px: float, text: str, size_px: float, **style: Any) -> None:
        """Text whose top left corner is here."""
        place = (left_px / self.width_px, 1 - top_px / self.height_px)
        self.figure.text(*place, text, size=points(size_px), va="top", ha="left", **style)

    def legend(
        self, left_px: float, top_px: float, handles: Sequence[Artist], columns: int
    ) -> None:
        """A frameless legend whose top left corner is here."""
        self.figure.legend(
            handles=list(handles),
            loc="upper left",
            bbox_to_anchor=(left_px / self.width_px, 1 - top_px / self.height_px),
            ncols=columns,
            frameon=False,
            fontsize=points(LEGEND_PX),
            borderpad=0,
            borderaxespad=0,
            handlelength=1.3,
            handleheight=1.0,
            handletextpad=0.45,
            columnspacing=1.5,
            labelspacing=0.4,
        )


LEGEND_PX = 13.0
LEGEND_ROW_PX = 19


def plain_frame(axes: Axes, keep: Sequence[str] = ()) -> None:
    """Take away the axes' frame but for the sides in `keep`, and make ticks short and grey."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color("#777777")
    axes.tick_params(length=3, color="#777777", labelsize=points(13))
