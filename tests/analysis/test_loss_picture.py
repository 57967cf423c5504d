from pathlib import Path

import pytest

from roundel.analysis.loss_picture import draw_losses, mean_of_last
from roundel.traces.errors import InputError


def test_curves_are_drawn(tmp_path: Path) -> None:
    curves = {f"run {number}": [3.0 - step / 10 for step in range(9)] for number in range(7)}
    draw_losses(curves, tmp_path / "losses.png", "Seven runs")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_a_window_longer_than_a_run_is_cut_to_the_shortest(tmp_path: Path) -> None:
    curves = {"first": [3.0, 2.0, 1.0], "second": [3.0, 2.5, 2.0]}
    for window in (2, 20):
        path = tmp_path / f"{window}.png"
        draw_losses(curves, path, "Two runs", chance=[[3.0, 2.1]], window=window)
    assert (tmp_path / "20.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_the_mean_of_the_last_steps() -> None:
    assert mean_of_last([1.0, 2.0, 3.0, 7.0], 1).tolist() == [1.0, 2.0, 3.0, 7.0]
    assert mean_of_last([1.0, 2.0, 3.0, 7.0], 2).tolist() == [1.5, 2.5, 5.0]


def test_a_wrong_path_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        draw_losses({"run": [1.0]}, tmp_path / "none" / "losses.png", "One")
