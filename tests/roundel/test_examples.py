"""Every example runs."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import roundel

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_policy_of_ones_own_runs_from_its_file() -> None:
    policy = roundel.make_policy(f"{EXAMPLES}/my_policy.py:Waves", most=8)
    waves = roundel.simulate("qwen3-1.7b-rtx4090", policy, devices=4, microbatches=16)
    assert waves.name == "Waves"
    assert str(waves.plan().devices[0][8]).endswith("B0")
    gpipe = roundel.simulate("qwen3-1.7b-rtx4090", "gpipe", devices=4, microbatches=16)
    assert waves.metrics.step_s > gpipe.metrics.step_s
    assert max(waves.metrics.peak_memory_bytes) < max(gpipe.metrics.peak_memory_bytes)


def test_the_demo_draws_every_picture_and_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    monkeypatch.setattr(roundel, "trace_names", lambda: ("qwen3-1.7b-rtx4090",))
    demo["main"](tmp_path)
    drawn = {path.name for path in (tmp_path / "qwen3-1.7b-rtx4090").iterdir()}
    assert drawn == {
        *(f"{name}.png" for name in roundel.POLICIES),
        *(f"{name}-memory.png" for name in roundel.POLICIES),
        "bubbles.png",
    }
    out = capsys.readouterr().out
    assert "winner: " in out
    assert str(tmp_path) in "".join(out.split("\n"))


def test_the_simulator_benchmark_runs() -> None:
    script = EXAMPLES.parent / "benchmarks" / "simulator.py"
    row = subprocess.run(
        [sys.executable, str(script), "--one", "8 x 16, 12 chunks", "shared links"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # The count of ops and tasks is a guard against tasks that nobody needs.
    assert row.split()[5:9] == ["shared", "links", "3,072", "6,208"]
