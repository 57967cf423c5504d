"""What would fit where nothing does: what is said of it is what the simulator says."""

from pathlib import Path

import pytest
from rich.console import Console

import roundel
from roundel.auto import NothingFits, candidates, choose
from roundel.policies.work import Work
from roundel.remedies import Given

from ..costs import make_machine, make_trace
from .training import run

KNOBS = {"recompute": "early"}
BYTES = {
    "param_bytes": 200,
    "grad_bytes": 200,
    "optimizer_bytes": 1200,
    "trainable_params": 100,
    "output_bytes": 100,
    "saved_bytes": 8000,
}


NOTHING = Given()


def work_with(memory: int, host: int = 0, **fields: int) -> Work:
    machine = make_machine(2, memory_bytes=memory).with_memory(memory, host or None)
    return roundel.make_work(make_trace(8, **BYTES | fields), microbatches=4, machine=machine)


def by_simulation(work: Work, given: Given = NOTHING) -> str:
    return str(refusal(work, given=given)).partition("; by simulation ")[2]


def refusal(work: Work, last: bool = True, given: Given = NOTHING) -> roundel.InputError:
    told: list[str] = []
    with pytest.raises(roundel.InputError) as error:
        choose(work, candidates(KNOBS, 4), Console(quiet=True), told.append, last, given)
    assert "\n" not in str(error.value)
    return error.value


def test_of_samples_that_are_too_long_a_part_would_fit() -> None:
    """A layer saves 8000 bytes: a quarter of that fits into 4000 with all else, half does not."""
    found = refusal(work_with(4000))
    assert isinstance(found, NothingFits)
    text = str(found).partition("; by simulation ")[2]
    assert text.startswith("with a quarter of the tokens in a sample ")
    assert " would fit, in " in text
    assert text.endswith("of gpu0's 3.91 KiB")
    # It is looked for once, when no more microbatches are left to be tried.
    assert "simulation" not in str(refusal(work_with(4000), last=False))


def test_states_of_few_bits_where_the_host_is_too_small() -> None:
    """1600 bytes of weights and 9600 of states; with states of 2.1 bytes 1680."""
    text = str(refusal(work_with(13_000, 6000))).partition("; by simulation ")[2]
    assert text.startswith("with --dtype bfloat16 --optim roundel.executor.low_bit.AdamW8bit ")
    assert text.endswith("of the host's 5.86 KiB")


def test_more_microbatches_where_a_batch_has_the_samples() -> None:
    """A quarter of what a layer saves, as above, from a quarter of the samples."""
    assert by_simulation(work_with(4000), Given(samples=4)).startswith("with 16 microbatches ")
    text = by_simulation(work_with(4000), Given(samples=3))
    assert text.startswith("with a quarter of the tokens in a sample ")


FLOAT32 = {"param_bytes": 400, "grad_bytes": 400}


def test_what_is_float32_needs_half_of_all_in_bfloat16() -> None:
    """Weights of 3200 bytes and states of 9600, of which 1600 and 1680 would be left; a layer
    saves 4000 then, but as much as before where autocast has seen to that already."""
    work = work_with(8000, 5200, **FLOAT32)
    text = by_simulation(work)
    assert text.startswith("with --dtype bfloat16 --optim roundel.executor.low_bit.AdamW8bit ")
    assert " and with" not in text
    cast = by_simulation(work, Given(autocast=True))
    assert cast.partition(" would fit")[0] != text.partition(" would fit")[0]


def test_both_where_both_memories_are_too_small() -> None:
    text = by_simulation(work_with(4000, 6000))
    assert text.startswith(
        "with --dtype bfloat16 --optim roundel.executor.low_bit.AdamW8bit "
        "and with a quarter of the tokens in a sample "
    )


def test_what_is_advised_trains_as_it_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    # To compile its updates would take most of the time, or to measure them uncompiled.
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr("roundel.executor.measure_machine.SIDE", 256)
    data = tmp_path / "text.txt"
    data.write_text("to be or not to be " * 200)
    line = (
        f"--model decoder-tiny --data {data} --sequence 32 --batch 4 -m 4 --steps 1 -d cpu "
        "--policy auto --memory 1MiB --host-memory 1MiB "
    )
    code, _, err = run(capsys, line)
    assert code == 2
    advice = err.partition("; by simulation with ")[2].partition(" round-robin")[0]
    assert advice.split()[::2] == ["--dtype", "--optim"]
    assert run(capsys, line + advice)[0] == 0


def test_nothing_is_said_where_nothing_would() -> None:
    assert "simulation" not in str(refusal(work_with(300)))
    assert "simulation" not in str(refusal(work_with(300, 1000)))
