from pathlib import Path

import pytest

from roundel.analysis.loss_picture import draw_losses
from roundel.traces.errors import InputError


def test_curves_are_drawn(tmp_path: Path) -> None:
    curves = {f"run {number}": [3.0 - step / 10 for step in range(9)] for number in range(7)}
    draw_losses(curves, tmp_path / "losses.png", "Seven runs")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_a_wrong_path_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        draw_losses({"run": [1.0]}, tmp_path / "none" / "losses.png", "One")
