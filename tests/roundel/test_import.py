"""`roundel import`: what it prints, what it writes, and that it can be simulated."""

import json
from pathlib import Path

import pytest

from roundel import Trace
from roundel.cli import main

from ..traces import profiles


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return profiles.one_step().write(tmp_path / "hand.json")


def test_the_tables_and_the_file(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    code, out, err = run(capsys, f"import {export} --layers layer --tokens 8 --name two -o {trace}")
    assert (code, err) == (0, "")
    cells = [line.split() for line in out.splitlines()]
    assert ["layer.0", "1", "10.00", "µs", "30.00", "µs", "0.0", "%"] in cells
    assert ["MseLossBackward0", "3.000", "µs", "3.4", "%"] in cells
    assert "optimizer 21.8 % (1 step), not assigned 6.9 %" in out
    assert Trace.load(trace).name == "two"
    code, out, _ = run(capsys, f"simulate {trace} --policy gpipe -d 2 -m 4 --hop-ms 0 --json")
    assert code == 0
    # Of 2 stages and 4 microbatches the longer forward and backward, 10.002 and 30 us, four times.
    assert json.loads(out)["makespan_s"] == pytest.approx(4 * 40.002e-6 + 20e-6, rel=1e-3)


def test_a_wrong_input_is_one_line(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    code, out, err = run(capsys, f"import {export} --layers nope --tokens 8 -o {trace}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no range matches 'nope'" in err
    assert not trace.exists()


def test_help_has_an_example_and_the_options_are_frozen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "import --help")
    assert code == 0
    assert "Example: roundel import" in out
    words = set(out.replace("│", " ").split())
    assert words >= {"--layers", "--tokens", "--name", "--output", "-o", "-t"}
