"""What a layer takes: every condition has its row, without a GPU too."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layer_times.py"


def test_every_condition_has_a_row() -> None:
    line = "--devices cpu,cpu --model decoder-tiny --sequence 8 --dtype float32 --repeats 2"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *line.split()], capture_output=True, text=True, check=True
    )
    rows = [row for row in done.stdout.splitlines() if row.endswith("%")]
    assert [row[:28].strip() for row in rows] == [
        "after 0.5 s",
        "after 3 s more",
        "after 6 s more",
        "the other GPUs at the same",
        "copies both ways beside",
        "both",
        "alone again",
    ]
    for row in rows:
        forward, backward, both, _ = map(float, row[28:].replace("%", "").split())
        assert 0 < forward < both
        assert abs(forward + backward - both) < 0.002
