from dataclasses import replace

from rich.console import Console

from roundel.analysis.metrics import Metrics, measure
from roundel.analysis.table import comparison_rows, comparison_table

from .build import ONE_F_ONE_B, build, curve

MEMORY = (
    curve("gpu0", {0: 3 << 30}, limit=4 << 30),
    curve("gpu1", {0: 1 << 30}),
    curve("host", {0: 1 << 40}),
)


def some() -> dict[str, Metrics]:
    slow = measure(build(ONE_F_ONE_B, unit_ns=1_000_000, memory=MEMORY))
    return {
        "slow": slow,
        "fast": replace(slow, step_s=0.001, tokens_per_s=200_000.0),
        "too big": replace(slow, step_s=0.0001, fits=False),
    }


def printed(width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(some(), "title", width=width))
    return console.export_text()


def test_rows():
    first, second, third = comparison_rows(some())
    assert first == (
        "slow",
        "9.000 ms",
        "22,222",
        "33.3 %",
        "5.6 %",
        "11.1 %",
        "5.6 %",
        "11.1 %",
        "0 s",
        "3.00 GiB",
        "1.00 TiB",
        "yes",
        False,
    )
    assert (second.wins, third.wins) == (True, False)
    assert third.fits == "no"


def test_the_table_marks_the_winner_and_is_cut_nowhere():
    text = printed(140)
    assert "fast★" in text
    assert text.count("★") == 1
    for words in ("switch", "11.1 %", "3.00 GiB", "1.00 TiB", "9.000 ms", "22,222"):
        assert words in text
    assert "…" not in text


def test_a_narrow_table_leaves_the_parts_out():
    text = printed(80)
    assert "switch" not in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
