"""What `auto` compares."""

import io

import pytest
from rich.console import Console

import roundel
from roundel import auto
from roundel.auto import candidates, choose, microbatch_counts
from roundel.traces.machine import ideal_machine


def test_round_robin_in_several_places_and_rounds() -> None:
    found = candidates({}, microbatches=8)
    ours = {name: each for name, each in found.items() if isinstance(each, roundel.RoundRobin)}
    places = ["activations on the device", "states through the device"]
    assert set(ours) == {
        ", ".join(["round-robin", *titles])
        for rounds in ([], ["one round"])
        for titles in (rounds, [*rounds, places[0]], [*rounds, places[1]], [*rounds, *places])
    }
    assert ours["round-robin, one round"].round_size == 8
    assert all(each.recompute == "early" for each in ours.values())
    assert "layer-to-layer, activations on the device" in found
    assert "layer-to-layer, one round" not in found
    assert "gpipe" in found
    assert found["gpipe, recompute"].recompute == "needed"


@pytest.mark.parametrize(
    ("knobs", "gone"),
    [
        ({"round_size": 4}, "one round"),
        ({"activations": "host"}, "activations on the device"),
        ({"optimizer_on": "host"}, "states through the device"),
    ],
)
def test_what_was_asked_for_is_not_changed(knobs: dict, gone: str) -> None:
    found = candidates(knobs, microbatches=8)
    assert f"round-robin, {gone}" not in found
    ((knob, value),) = knobs.items()
    ours = [each for each in found.values() if isinstance(each, roundel.RoundRobin)]
    assert len(ours) == 4
    assert all(getattr(each, knob) == value for each in ours)


@pytest.mark.parametrize(
    ("knobs", "ways"),
    [
        (
            {},
            {
                "gpipe": ("none", None),
                "gpipe, recompute": ("needed", None),
                "gpipe, recompute by layer": ("needed", 1),
                "gpipe, recompute all by layer": ("early", 1),
            },
        ),
        ({"recompute": "none"}, {"gpipe": ("none", None)}),
        (
            {"recompute": "late"},
            {"gpipe": ("late", None), "gpipe, recompute by layer": ("late", 1)},
        ),
        (
            {"recompute_layers": 2},
            {
                "gpipe": ("none", None),
                "gpipe, recompute": ("needed", 2),
                "gpipe, recompute all by layer": ("early", 2),
            },
        ),
    ],
)
def test_ways_to_recompute(knobs: dict, ways: dict[str, tuple[str, int | None]]) -> None:
    found = candidates(knobs, microbatches=8)
    ours = {name: each for name, each in found.items() if isinstance(each, roundel.GPipe)}
    assert {name: (each.recompute, each.recompute_layers) for name, each in ours.items()} == ways


def test_without_recompute_nothing_is_streamed() -> None:
    names = candidates({"recompute": "none"}, 8)
    assert not any("round-robin" in name or "layer-to-layer" in name for name in names)


def test_microbatches_double_until_each_has_one_sample() -> None:
    assert microbatch_counts(4, 6) == [4, 6]
    assert microbatch_counts(2, 16) == [2, 4, 8, 16]
    assert microbatch_counts(3, 3) == [3]


def test_what_is_chosen_keeps_the_cut_that_it_was_simulated_with() -> None:
    """Also where it is planned anew with more memory, whose best cut takes more of it."""
    trace = roundel.api.load_trace("qwen3-1.7b-rtx4090")
    work = roundel.make_work(
        trace, microbatches=8, machine=ideal_machine(1).with_memory(12 * 2**30)
    )
    winner = choose(work, {"it": roundel.RoundRobin()}, Console(quiet=True), lambda what: None)
    cut = roundel.RoundRobin().cut(work)
    assert isinstance(winner, roundel.RoundRobin)
    assert (winner.partition, winner.backward_partition) == (cut.forward, cut.backward)
    resident = roundel.GPipe()
    free = roundel.make_work(trace, microbatches=8, machine=ideal_machine(1))
    assert choose(free, {"it": resident}, Console(quiet=True), lambda what: None) is resident


def test_the_table_has_the_best_and_says_how_many_more_there_are() -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    trace = roundel.load_trace("qwen3-1.7b-rtx4090")
    work = roundel.make_work(trace, microbatches=2, machine=ideal_machine(2))
    choose(work, candidates({}, 2), console, lambda what: None)
    table, rest = console.export_text().split("\nand ")
    rows = table.partition("───\n")[2].splitlines()
    assert len([row for row in rows if " no" in row or " yes" in row]) == auto.MOST_ROWS
    assert int(rest.partition(" more, which are slower or do not fit")[0]) > 10


def test_of_policies_with_the_same_plans_only_the_first_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one device all microbatches of a round stay there, whatever rotates over devices."""
    monkeypatch.setattr(auto, "MOST_ROWS", None)
    trace = roundel.api.load_trace("qwen3-1.7b-rtx4090")

    def shown(devices: int) -> str:
        console = Console(record=True, width=160, file=io.StringIO())
        work = roundel.make_work(trace, microbatches=2, machine=ideal_machine(devices))
        choose(work, candidates({}, 2), console, lambda what: None)
        return console.export_text()

    one, two = shown(1), shown(2)
    for name in ("round-robin", "activations on the device", "zb-v, recompute"):
        assert name in one
    assert "layer-to-layer" in two
    assert "layer-to-layer" not in one
    assert "one round" not in one
