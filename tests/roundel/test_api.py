from dataclasses import dataclass

import pytest

import roundel

from ..costs import make_machine, make_trace


def test_the_winner_is_the_policy_object_itself() -> None:
    candidates = [roundel.GPipe(), roundel.Interleaved1F1B(chunks=2)]
    comparison = roundel.compare(make_trace(8), candidates, devices=4, microbatches=8)
    assert comparison.winner is candidates[1]
    assert comparison.best.name == "interleaved-1f1b"


def test_who_does_not_fit_cannot_win() -> None:
    trace = make_trace(8, saved_bytes=1000, output_bytes=10)
    machine = make_machine(4, memory_bytes=9000)
    candidates = [roundel.Interleaved1F1B(chunks=2), roundel.OneFOneB(recompute="late")]
    comparison = roundel.compare(trace, candidates, machine=machine, microbatches=8)
    fast, lean = comparison.simulations
    assert fast.metrics.step_s < lean.metrics.step_s
    assert not fast.metrics.fits
    assert comparison.winner is candidates[1]
    assert comparison.ranking[-1].name == "interleaved-1f1b"


def test_two_of_one_kind_are_told_apart() -> None:
    candidates = [roundel.OneFOneB(recompute="late"), roundel.OneFOneB(), roundel.OneFOneB()]
    comparison = roundel.compare(make_trace(4), candidates, devices=4, microbatches=8)
    names = [each.name for each in comparison.simulations]
    assert names == ["1f1b (recompute=late)", "1f1b", "1f1b #2"]
    assert comparison.winner is candidates[1]


def test_nobody_fits_nobody_wins() -> None:
    trace = make_trace(4, saved_bytes=1000)
    comparison = roundel.compare(
        trace, ["gpipe"], machine=make_machine(2, memory_bytes=1), microbatches=2
    )
    assert comparison.winner is None
    over = comparison.simulations[0].timeline.memory[0]
    assert over.over_bytes == 2 * 2 * 1000 - 1
    assert over.holders == (("saved activations", 4000),)


def test_a_policy_that_cannot_run_is_refused_with_its_reason() -> None:
    comparison = roundel.compare(
        "qwen3-1.7b-rtx4090", ["gpipe", "zb-h1"], devices=2, microbatches=4
    )
    assert [each.name for each in comparison.simulations] == ["gpipe"]
    assert "does not split its backward" in comparison.refused["zb-h1"]


def test_without_a_machine_the_preset_with_the_traces_gpu_is_taken() -> None:
    work = roundel.make_work("qwen3-1.7b-rtx4090", devices=4, microbatches=1)
    assert (work.machine.name, work.devices) == ("8x-rtx4090", 4)
    assert (
        roundel.make_work("qwen3-1.7b-rtx4090", devices=9, microbatches=1).machine.name == "ideal"
    )
    hop = roundel.make_work("qwen3-1.7b-rtx4090", devices=4, microbatches=1, hop_ns=7)
    assert (hop.machine.name, hop.machine.hop_ns) == ("ideal", 7)


def test_hop_time_on_a_machine_keeps_its_memory() -> None:
    work = roundel.make_work("qwen3-1.7b-rtx4090", machine="8x-rtx4090", microbatches=1, hop_ns=7)
    assert (work.devices, work.machine.devices[0].memory_bytes) == (8, 24 * 2**30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatches": 0, "devices": 2}, "microbatches: must be at least 1"),
        ({"microbatches": 1}, "devices: give their number"),
        ({"microbatches": 1, "devices": 0}, "at least 1"),
        ({"microbatches": 1, "devices": 2, "steps": 0}, "steps: must be at least 1"),
        ({"microbatches": 1, "machine": "1x-h100", "devices": 2}, "has 1 devices, 2 were asked"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments: dict, message: str) -> None:
    with pytest.raises(roundel.InputError, match=message):
        roundel.simulate(make_trace(4), "gpipe", **arguments)


@dataclass(frozen=True)
class Backwards:
    """A user's policy that forgets its last microbatch."""

    def plan(self, work: roundel.Work, step: int) -> roundel.Plan:
        plan = roundel.GPipe().plan(work, step)
        return roundel.Plan((plan.devices[0][:-1], *plan.devices[1:]))


def test_a_users_wrong_policy_is_refused_by_the_op() -> None:
    with pytest.raises(roundel.InputError, match="no B or I of layer 0 for microbatch 3"):
        roundel.simulate(make_trace(4), Backwards(), devices=2, microbatches=4)


def test_steps_overlap_only_where_the_optimizer_is_stale() -> None:
    trace = make_trace(9, param_bytes=8, grad_bytes=8, optimizer_bytes=48)
    both = [roundel.RoundRobin(optimizer=kind) for kind in ("sync", "stale")]
    sync, stale = (
        roundel.simulate(trace, each, devices=4, microbatches=4, steps=6).metrics for each in both
    )
    assert stale.step_s < sync.step_s
    assert stale.bubble_ratio < sync.bubble_ratio / 2
