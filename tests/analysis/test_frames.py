from pathlib import Path

import pandas as pd
import pytest

from roundel.analysis.frames import memory_frame, metrics_frame, spans_frame, write_csv
from roundel.analysis.metrics import measure
from roundel.traces.errors import InputError

from .build import ONE_F_ONE_B, build, curve

COLUMNS = (
    "kind lane device first stop microbatch step bytes start_ns end_ns exposed_ns".split()  # noqa: SIM905
)
PICTURE = """
    gpu0:           F0 F0 B0'
    gpu0 h2d:       upload . .
    host optimizer: . . update
"""


def test_spans_frame():
    frame = spans_frame(build(PICTURE, unit_ns=10))
    assert list(frame.columns) == COLUMNS
    assert frame.astype(object).values.tolist() == [
        ["F", "gpu0 compute", 0, 0, 1, 0, 0, 0, 0, 20, 0],
        ["B", "gpu0 compute", 0, 0, 1, 0, 1, 0, 20, 30, 0],
        ["upload", "gpu0 h2d", 0, 0, 1, -1, 0, 0, 0, 10, 0],
        ["update", "host optimizer", -1, 0, 1, -1, 0, 0, 20, 30, 0],
    ]


def test_memory_frame():
    memory = (curve("gpu0", {0: 5, 7: 9}, limit=8), curve("host", {0: 1}))
    frame = memory_frame(build(PICTURE, memory=memory))
    assert frame.astype(object).values.tolist() == [
        ["gpu0", 0, 5, 8],
        ["gpu0", 7, 9, 8],
        ["host", 0, 1, 0],
    ]
    assert list(frame.columns) == ["memory", "time_ns", "used_bytes", "limit_bytes"]
    assert len(memory_frame(build(PICTURE))) == 0


def test_metrics_frame():
    memory = (curve("gpu0", {0: 5}), curve("gpu1", {0: 9}), curve("host", {0: 1}))
    metrics = measure(build(ONE_F_ONE_B, memory=memory))
    frame = metrics_frame({"a": metrics, "b": metrics})
    assert list(frame.index) == ["a", "b"]
    assert frame.loc["b", "bubble_switch"] == pytest.approx(2 / 18)
    assert frame.loc["b", "peak_memory_bytes"] == 9
    assert metrics_frame({}).empty


@pytest.mark.parametrize("name", ["spans.csv", "spans.csv.gz"])
def test_csv_reads_back(tmp_path: Path, name: str):
    timeline = build(ONE_F_ONE_B)
    write_csv(timeline, tmp_path / name)
    back = pd.read_csv(tmp_path / name)
    pd.testing.assert_frame_equal(
        back, spans_frame(timeline), check_categorical=False, check_dtype=False
    )


def test_wrong_paths(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        write_csv(build(PICTURE), tmp_path / "nowhere" / "a.csv")
    with pytest.raises(InputError, match="it is a folder"):
        write_csv(build(PICTURE), tmp_path)
