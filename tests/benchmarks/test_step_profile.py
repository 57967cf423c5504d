"""Where a step's time goes: gaps of a stream by their reason, and the tables without a GPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "step_profile.py"


def kernel(number: int, start: float, end: float, stream: int = 7) -> dict[str, Any]:
    args = {"correlation": number, "device": 0, "stream": stream}
    return {"cat": "kernel", "name": "k", "ts": start, "dur": end - start, "args": args}


def call(name: str, number: int, start: float, end: float) -> dict[str, Any]:
    args = {"correlation": number}
    return {
        "cat": "cuda_runtime", "name": name, "ts": start, "dur": end - start, "tid": 1, "args": args
    }  # fmt: skip


def test_a_gap_is_the_hosts_or_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels 1 and 2 in a row; 3 launched late, after an allocation; 4 in time, but it waited."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(SCRIPT))
    events = [
        kernel(9, 0, 50, stream=8),
        kernel(1, 100, 1100),
        kernel(2, 1105, 2000),
        kernel(3, 5010, 6000),
        kernel(4, 8000, 9000),
        call("cudaLaunchKernel", 1, 10, 20),
        call("cudaLaunchKernel", 2, 30, 40),
        call("cudaMalloc", 5, 45, 4900),
        call("cudaLaunchKernel", 3, 5000, 5005),
        call("cudaLaunchKernel", 4, 5006, 5010),
    ]
    found = script["gaps_of"](events)
    assert list(found["streams"]) == ["gpu0"]
    stream = found["streams"]["gpu0"]
    assert stream["busy_ms"] == pytest.approx(3.885)
    assert (stream["late"], stream["waited"]) == (1, 1)
    assert stream["late_ms"] == pytest.approx(3.005)
    assert stream["waited_ms"] == pytest.approx(2.005)
    assert list(found["late_after"]) == ["in cudaMalloc"]
    assert found["calls"]["cudaMalloc"]["longest_ms"] == pytest.approx(4.855)
    assert found["calls"]["cudaLaunchKernel"]["calls"] == 4


def test_the_tables_of_a_policy(tmp_path: Path) -> None:
    tiny = (
        "--model decoder-tiny --dtype float32 --steps 1 --sequence 16 --sequences 2 "
        "--microbatches 3 --devices cpu,cpu"
    )
    call = [sys.executable, str(SCRIPT), "--out", str(tmp_path), *tiny.split()]
    done = subprocess.run(
        [*call, "--systems", "round-robin"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "round-robin: steps " in done.stdout
    figures = json.loads((tmp_path / "step_profile.json").read_text())["results"]["round-robin"]
    kinds = figures["kinds"]
    forwards = [row for name, row in kinds.items() if name.endswith("compute F")]
    assert sum(row["tasks"] for row in forwards) >= 3
    assert all(row["simulated_ms"] > 0 for row in forwards)
