"""How fast the host updates: every condition has its row, without a GPU too."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_rate.py"


def test_every_condition_has_a_row() -> None:
    line = "--devices cpu --seconds 0.01"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *line.split()], capture_output=True, text=True, check=True
    )
    rows = [row for row in done.stdout.splitlines() if row.startswith(("float32,", "bfloat16,"))]
    assert [row[:36].strip() for row in rows[:2]] == [
        "float32, 0 kernels beside",
        "float32, 480 kernels beside",
    ]
    assert len(rows) == 2 * 6 + 4
    for row in rows:
        assert all(0 < float(rate) < 1000 for rate in row[36:].split())
