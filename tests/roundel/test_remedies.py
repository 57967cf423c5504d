"""What would fit where nothing does: what is said of it is what the simulator says."""

import pytest
from rich.console import Console

import roundel
from roundel.auto import NothingFits, candidates, choose
from roundel.policies.work import Work

from ..costs import make_machine, make_trace

KNOBS = {"recompute": "early"}
BYTES = {
    "param_bytes": 200,
    "grad_bytes": 200,
    "optimizer_bytes": 1200,
    "trainable_params": 100,
    "output_bytes": 100,
    "saved_bytes": 8000,
}


def work_with(memory: int, host: int = 0) -> Work:
    machine = make_machine(2, memory_bytes=memory).with_memory(memory, host or None)
    return roundel.make_work(make_trace(8, **BYTES), microbatches=4, machine=machine)


def refusal(work: Work, last: bool = True) -> roundel.InputError:
    told: list[str] = []
    with pytest.raises(roundel.InputError) as error:
        choose(work, candidates(KNOBS, 4), Console(quiet=True), told.append, last)
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
    assert text.startswith("with --dtype bfloat16 --optim torchao.optim.AdamW8bit ")
    assert text.endswith("of the host's 5.86 KiB")


def test_nothing_is_said_where_nothing_would() -> None:
    assert "simulation" not in str(refusal(work_with(300)))
    assert "simulation" not in str(refusal(work_with(300, 1000)))
