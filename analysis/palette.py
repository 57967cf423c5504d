"""One colour a kind, told apart by colour-blind readers, and in greyscale where kinds meet.

Most colours are Okabe and Ito's set (Color Universal Design, 2008); their lightness is spread so
that kinds that share a lane differ in greyscale too. `tests/analysis/test_palette.py` holds both.
"""

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from ..traces.timeline import KINDS

COLOURS = {
    "F": "#17508F",
    "R": "#9AD2F0",
    "B": "#E69F00",
    "I": "#C44E00",
    "W": "#F5E76B",
    "upload": "#007A5A",
    "download": "#CC79A7",
    "send": "#7F7F7F",
    "offload": "#6B2C6B",
    "fetch": "#8FD6B0",
    "update": "#454545",
    "norm": "#A88B6A",
}
MEANINGS = {
    "F": "forward",
    "R": "recompute",
    "B": "backward",
    "I": "backward, input part",
    "W": "backward, weight part",
    "upload": "weights in",
    "download": "gradients out",
    "send": "to another GPU",
    "offload": "activations out",
    "fetch": "activations in",
    "update": "optimizer update",
    "norm": "gradient norm",
}
MEANINGS_IN_TRANSIT = {
    "upload": "weights and states in",
    "download": "gradients, weights and states out",
}
"""Where states pass through the devices."""

LEGEND_ORDER = tuple(COLOURS)

BUBBLE_COLOURS = {
    "fill": "#56B4E9",
    "switch": "#F0C24B",
    "steady": "#8C8C8C",
    "drain": "#1F5FA6",
}
BUBBLE_MEANINGS = {
    "fill": "fill: waiting for the first work",
    "switch": "switch: between forward and backward",
    "steady": "steady: waiting in mid-stream",
    "drain": "drain: waiting for the others to end",
}
LIMIT_COLOUR = "#B3261E"
IDLE_COLOUR = "#FFFFFF"
BACKGROUND = "#E4E6E8"


def colour_table() -> NDArray[np.float64]:
    """RGB from 0 to 1 of each kind, shape (kinds, 3), by the codes of `KINDS`."""
    return np.array([to_rgb(COLOURS[kind]) for kind in KINDS])


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (W3C relative luminance)."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"
