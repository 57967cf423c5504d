"""The boxes of a timeline picture: as one collection, or as pixels where there are very many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from numpy.typing import ArrayLike, NDArray

from ..traces.timeline import KINDS, Timeline
from .figure import points
from .layout import Layout
from .palette import BACKGROUND, COLOURS, IDLE_COLOUR, colour_table, ink_on

Floats = NDArray[np.float64]

MOST_BOXES = 20_000
MOST_LABELS = 20_000
_EDGED_PX = 4.0
_EDGED_ROW_PX = 6
_LABEL_PX = (12.0, 8.5)
_DIGIT_EM = 0.64
_MARGIN_EM = 0.2


@dataclass(frozen=True)
class Boxes:
    """Rectangles in pixels of the axes: x to the right, y down. `kind` holds the kinds' codes."""

    left: Floats
    right: Floats
    top: Floats
    bottom: Floats
    kind: NDArray[np.integer]
    microbatch: NDArray[np.integer]
    row: NDArray[np.integer]

    @classmethod
    def of(cls, timeline: Timeline, layout: Layout, px_per_ns: float) -> "Boxes":
        """A box a task, without those of lanes that are left out."""
        top = layout.top_px[timeline.lane].astype(np.float64)
        boxes = cls(
            left=timeline.start_ns.astype(np.float64) * px_per_ns,
            right=timeline.end_ns.astype(np.float64) * px_per_ns,
            top=top,
            bottom=top + layout.row_px[timeline.lane],
            kind=timeline.kind,
            microbatch=timeline.microbatch,
            row=timeline.lane,
        )
        return boxes if layout.row_px.all() else boxes.where(boxes.bottom > boxes.top)

    def __len__(self) -> int:
        return len(self.left)

    def where(self, rows: NDArray[np.bool_]) -> "Boxes":
        """Only these boxes."""
        columns = (self.left, self.right, self.top, self.bottom)
        left, right, top, bottom = (column[rows] for column in columns)
        ids = (self.kind[rows], self.microbatch[rows], self.row[rows])
        return Boxes(left, right, top, bottom, *ids)

    @property
    def width(self) -> Floats:
        return self.right - self.left


def is_crowded(timeline: Timeline, width_px: int) -> bool:
    """Whether there are too many tasks for boxes: MOST_BOXES, or more in a row than pixels."""
    return len(timeline) > MOST_BOXES or int(np.bincount(timeline.lane).max(initial=0)) > width_px


def draw_boxes(
    axes: Axes, timeline: Timeline, layout: Layout, px_per_ns: float, width_px: int
) -> bool:
    """Draw a box a task, and the microbatch numbers in them. The axes' units are pixels.

    Returns whether there was room for a number.

    In a crowded timeline each pixel is coloured by the shares of time that the kinds take in it,
    and only wide boxes in high rows are drawn as such; tasks of lanes other than compute take up
    to a pixel where there is room, so that short transfers can be seen.
    """
    boxes = Boxes.of(timeline, layout, px_per_ns)
    if is_crowded(timeline, width_px):
        image = coverage(_widened(boxes, layout), layout, width_px)
        extent = (0, width_px, layout.height_px, 0)
        axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", zorder=1)
        high = boxes.bottom - boxes.top >= _EDGED_ROW_PX
        axes.add_collection(_collection(boxes.where(high & (boxes.width >= _EDGED_PX))))
    else:
        axes.add_collection(_bands(layout, width_px))
        axes.add_collection(_collection(boxes))
    return draw_numbers(axes, boxes)


def coverage(boxes: Boxes, layout: Layout, width_px: int) -> NDArray[np.uint8]:
    """The picture of the boxes, shape (height, width, 3): exact shares of colour in each pixel."""
    rows = len(layout.row_px)
    colours = colour_table()[boxes.kind]
    covered = _shares(boxes, np.ones(len(boxes)), rows, width_px)
    image = np.empty((layout.height_px, width_px, 3), dtype=np.uint8)
    image[:] = np.array(_channels(BACKGROUND), dtype=np.uint8)
    for channel in range(3):
        line = _shares(boxes, colours[:, channel], rows, width_px) + np.maximum(1 - covered, 0)
        values = np.rint(np.clip(line * 255, 0, 255)).astype(np.uint8)
        for row in np.flatnonzero(layout.row_px):
            top = layout.top_px[row]
            image[top : top + layout.row_px[row], :, channel] = values[row]
    return image


LEAST_PX = 0.15
"""In a crowded picture a short transfer tints its pixel by at least so much."""


def _widened(boxes: Boxes, layout: Layout) -> Boxes:
    """The boxes, those beside the compute lanes a little wider where they would vanish."""
    order = np.lexsort((boxes.left, boxes.row))
    left, row = boxes.left[order], boxes.row[order]
    beyond = np.append(np.where(np.diff(row) == 0, left[1:], np.inf), np.inf)
    room = np.empty(len(boxes))
    room[order] = np.minimum(left + LEAST_PX, beyond)
    beside = np.array([lane.kind != "compute" for lane in layout.lanes])[boxes.row]
    return replace(boxes, right=np.where(beside, np.maximum(boxes.right, room), boxes.right))


def _shares(boxes: Boxes, weight: Floats, rows: int, width_px: int) -> Floats:
    """Sum over the boxes of weight times the share of each pixel column that they cover."""
    left = np.clip(boxes.left, 0, width_px)
    right = np.clip(boxes.right, left, width_px)
    first, last = left.astype(np.int64), right.astype(np.int64)
    base = boxes.row.astype(np.int64) * (width_px + 2)
    size = rows * (width_px + 2)
    # A box [left, right) is the difference of two half-lines; a half-line from x covers the rest
    # of the pixel that x is in, and all pixels after it.
    change = np.bincount(base + first, weight * (first + 1 - left), size)
    change += np.bincount(base + first + 1, weight * (left - first), size)
    change -= np.bincount(base + last, weight * (last + 1 - right), size)
    change -= np.bincount(base + last + 1, weight * (right - last), size)
    shares = np.cumsum(change.reshape(rows, width_px + 2), axis=1)
    return np.asarray(shares[:, :width_px], dtype=np.float64)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _corners(left: Floats, right: Floats, top: Floats, bottom: Floats) -> Sequence[ArrayLike]:
    """Rectangles as corners: an array of shape (boxes, 4, 2), for which matplotlib is fast."""
    x = np.stack([left, right, right, left], axis=1)
    y = np.stack([top, top, bottom, bottom], axis=1)
    return cast(Sequence[ArrayLike], np.stack([x, y], axis=2))


def _bands(layout: Layout, width_px: int) -> PolyCollection:
    """The white rows on which the boxes lie: idle time."""
    rows = np.flatnonzero(layout.row_px)
    left, right = np.zeros(len(rows)), np.full(len(rows), float(width_px))
    top = layout.top_px[rows].astype(np.float64)
    corners = _corners(left, right, top, top + layout.row_px[rows])
    return PolyCollection(corners, facecolors=IDLE_COLOUR, linewidths=0, zorder=1)


def _collection(boxes: Boxes) -> PolyCollection:
    """All boxes as one collection, none thinner than a pixel; the wide ones have an edge.

    A shorter task, such as a send, would vanish when its box is rounded to whole pixels.
    """
    right = np.maximum(boxes.right, boxes.left + 1.0)
    corners = _corners(boxes.left, right, boxes.top, boxes.bottom)
    edged = boxes.width >= _EDGED_PX
    return PolyCollection(
        corners,
        facecolors=colour_table()[boxes.kind],
        edgecolors=[(0.1, 0.1, 0.1, 0.75)],
        linewidths=np.where(edged, points(0.7), 0.0),
        zorder=2,
    )


def draw_numbers(axes: Axes, boxes: Boxes) -> bool:
    """Write the microbatch number into each box where it fits. Returns whether one did.

    A number is a marker, drawn once and stamped wherever it belongs, since text costs most of a
    picture's time. Every number has one size or a smaller one, or is left out.
    """
    left_over = boxes.where(boxes.microbatch >= 0)
    budget = MOST_LABELS
    for size_px in _LABEL_PX:
        fits = _fits(left_over, size_px)
        fits &= np.cumsum(fits) <= budget
        budget -= int(fits.sum())
        if fits.any():
            _stamp(axes, left_over.where(fits), size_px)
        left_over = left_over.where(~fits)
    return budget < MOST_LABELS


def _fits(boxes: Boxes, size_px: float) -> NDArray[np.bool_]:
    digits = np.char.str_len(boxes.microbatch.astype(np.str_))
    wide = boxes.width >= (digits * _DIGIT_EM + _MARGIN_EM) * size_px
    high = boxes.bottom - boxes.top >= size_px + 1
    return np.asarray(wide & high)


def _stamp(axes: Axes, boxes: Boxes, size_px: float) -> None:
    light = np.array([ink_on(COLOURS[kind]) == "white" for kind in KINDS])[boxes.kind]
    keys = boxes.microbatch.astype(np.int64) * 2 + light
    order = np.argsort(keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    x, y = (boxes.left + boxes.right) / 2, (boxes.top + boxes.bottom) / 2
    for value, members in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
        outline = _outline(str(value // 2), size_px)
        ink = "white" if value % 2 else "black"
        stamp = Line2D(x[members], y[members], linestyle="none", color=ink, zorder=3)
        stamp.set_marker(outline)
        # matplotlib scales a marker so that its furthest point lies at half of its size.
        stamp.set_markersize(2 * float(np.abs(outline.vertices).max()))
        stamp.set_markeredgewidth(0)
        axes.add_line(stamp)


def _outline(text: str, size_px: float) -> Outline:
    """The outline of `text`, in points, its middle at the origin."""
    font = FontProperties(family="DejaVu Sans")
    path = TextPath((0, 0), text, size=points(size_px), prop=font)
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2))
