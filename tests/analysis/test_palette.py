from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from roundel.analysis.palette import BUBBLE_COLOURS, BUBBLE_MEANINGS, COLOURS, MEANINGS, ink_on
from roundel.traces.timeline import KINDS

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
# deficiency" (2009), severity 1.0, on linear RGB.
SIGHTS = {
    "full": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
SAME_LANE = [
    ("F", "R", "B", "I", "W", "update"),
    ("upload", "fetch"),
    ("download", "offload"),
    ("update", "norm"),
]


def lab(colour: str, sight: str = "full") -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as seen with `sight`."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = np.array(to_xyz) @ seen / np.array([0.9505, 1.0, 1.0888])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_kind_has_a_colour_and_a_meaning():
    assert set(COLOURS) == set(MEANINGS) == set(KINDS)
    assert set(BUBBLE_COLOURS) == set(BUBBLE_MEANINGS) == {"fill", "switch", "steady", "drain"}


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("kinds", [*SAME_LANE, tuple(BUBBLE_COLOURS)])
def test_kinds_that_share_a_lane_are_told_apart(kinds: tuple[str, ...], sight: str):
    colours = COLOURS | BUBBLE_COLOURS
    for one, other in combinations(kinds, 2):
        difference = np.linalg.norm(lab(colours[one], sight) - lab(colours[other], sight))
        assert difference > 15, (one, other, sight)


@pytest.mark.parametrize("kinds", [("F", "I", "B", "R", "W"), *SAME_LANE[1:]])
def test_kinds_that_share_a_lane_differ_in_greyscale(kinds: tuple[str, ...]):
    lightness = sorted(lab(COLOURS[kind])[0] for kind in kinds)
    assert min(np.diff(lightness)) > 7


@pytest.mark.parametrize(("colour", "ink"), [("#000000", "white"), ("#FFFFFF", "black")])
def test_ink(colour: str, ink: str):
    assert ink_on(colour) == ink
