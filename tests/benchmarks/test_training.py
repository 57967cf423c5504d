"""The benchmark of training systems: without a GPU, all of them train the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
TINY = (
    "--model decoder-tiny --dtype float32 --lr 1e-3 --steps 2 "
    "--sequence 16 --sequences 2 --microbatches 3"
)


def table(out: Path, systems: str, devices: str) -> tuple[list[str], dict[str, Any]]:
    """The rows that are printed below the table's head, and the results that are written."""
    call = [sys.executable, str(SCRIPT), "--out", str(out), *TINY.split()]
    done = subprocess.run(
        [*call, "--systems", systems, "--devices", devices],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("system "))
    return lines[first + 1 :], json.loads((out / "training.json").read_text())["results"]


def test_all_train_the_same_model(tmp_path: Path) -> None:
    own = "layer-to-layer[partition=2 2,backward_partition=2 4]"
    each = "plain, on each GPU at once"
    torch = ["torch-1f1b", "torch-interleaved-1f1b", "fsdp2-offload"]
    systems = ["plain", each, "layer-to-layer", own, *torch]
    rows, results = table(tmp_path, ",".join(systems), "cpu,cpu")
    assert list(results) == systems, rows
    assert [row[: len(name) + 1] for row, name in zip(rows, systems, strict=True)] == [
        f"{name} " for name in systems
    ]
    losses = results["plain"]["losses"]
    # Two batches take turns: by the fourth step a model that learns has seen each once before.
    assert losses[2] < losses[0] - 0.02
    assert losses[3] < losses[1] - 0.02
    for name in systems:
        assert results[name]["losses"] == pytest.approx(losses, abs=1e-5), name
    whole = results[each]["tokens_per_s"] * results[each]["mean_step_s"]
    alone = results["plain"]["tokens_per_s"] * results["plain"]["mean_step_s"]
    assert whole == pytest.approx(2 * alone)


def test_a_system_that_cannot_run_says_why_and_the_table_goes_on(tmp_path: Path) -> None:
    rows, results = table(tmp_path, "torch-1f1b,roundpipe", "cpu")
    assert rows[0].split(maxsplit=1) == ["torch-1f1b", "needs at least two devices"]
    assert rows[1].split(maxsplit=1)[0] == "roundpipe"
    assert rows[1].split(maxsplit=1)[1].startswith(("not installed", "needs GPUs"))
    assert len(rows) == 2
    assert not results
