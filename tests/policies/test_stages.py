"""What a policy with fixed placement refuses, in one line that says what to do."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.lowering import lower
from roundel.policies.one_f_one_b import OneFOneB
from roundel.policies.plan import Plan, Recompute
from roundel.policies.work import Work
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_v import ZBV
from roundel.sim.engine import simulate_program
from roundel.traces.errors import InputError
from roundel.traces.machine import ideal_machine
from roundel.traces.trace import LayerCost, Trace

from ..costs import make_work


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda: GPipe().plan(make_work(3, 4, 1), 0),
            "gpipe: 4 stages (4 devices x 1 a device) need at least as many layers, "
            "the trace has 3 (head included); use fewer devices or chunks",
        ),
        (
            lambda: ZBV().plan(make_work(3, 2, 1), 0),
            "zb-v: 4 stages (2 devices x 2 a device) need at least as many layers, "
            "the trace has 3 (head included); use fewer devices or chunks",
        ),
        (
            lambda: GPipe(partition=(3, 0)).plan(make_work(3, 2, 1), 0),
            "gpipe: partition 3 0: every stage must have at least one layer",
        ),
        (
            lambda: Interleaved1F1B(partition=(2, 1)).plan(make_work(3, 2, 1), 0),
            "interleaved-1f1b: partition 2 1: has 2 stages, "
            "it must have 4 stages (2 devices x 2 a device)",
        ),
        (
            lambda: GPipe(partition=(2, 2)).plan(make_work(3, 2, 1), 0),
            "gpipe: partition 2 2: has 4 layers, the trace 3 (head included)",
        ),
        (
            lambda: LoopedBFS(chunks=0).plan(make_work(3, 2, 1), 0),
            "looped-bfs: chunks: must be at least 1, got 0",
        ),
        (
            lambda: GPipe(recompute="soon").plan(make_work(3, 2, 1), 0),  # type: ignore[arg-type]
            "gpipe: recompute: must be none, early, late or needed, got 'soon'",
        ),
        (
            lambda: ZBH1(weight_share=1.5).plan(make_work(3, 2, 1), 0),
            "zb-h1: weight_share: must be from 0 to 1, got 1.5",
        ),
    ],
)
def test_refusals(plan: Callable[[], Plan], message: str) -> None:
    with pytest.raises(InputError) as error:
        plan()
    assert str(error.value) == message


def unsplit_work() -> Work:
    layers = tuple(LayerCost(name=f"layer.{n}", forward_ns=10, backward_ns=20) for n in range(4))
    trace = Trace(name="t", device="d", provenance="p", microbatch_tokens=1, layers=layers)
    return Work(trace, ideal_machine(2), 2)


@pytest.mark.parametrize("partition", [None, (2, 2)])
def test_zero_bubble_asks_for_a_split_or_a_share(partition: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match=r"layer layer\.0: the trace does not split its backward"):
        ZBH1(partition=partition).plan(unsplit_work(), 0)
    plan = ZBH1(partition=partition, weight_share=0.4).plan(unsplit_work(), 0)
    assert plan.weight_share == 0.4


def test_the_knobs_that_a_plan_carries() -> None:
    plan = ZBV(optimizer_on="host", clip=True).plan(make_work(4, 2, 2), 0)
    assert plan.optimizer_on == "host"
    assert plan.clip
    assert (plan.weights, plan.optimizer) == ("resident", "sync")


def test_the_cut_counts_recompute_as_work() -> None:
    """Forward and backward 1 + 9, 6 + 1, 6 + 1: the best cut is 10 | 14, with recompute 24 | 13."""
    work = make_work([(1, 5, 4), (6, 1, 0), (6, 1, 0)], 2, 1)
    assert GPipe().plan(work, 0).devices[0][0].stop == 1
    assert GPipe(recompute="late").plan(work, 0).devices[0][0].stop == 2


def test_the_cut_counts_a_forward_that_leaves_nothing_by_its_own_time() -> None:
    """Of 12 a layer 2 and 2 layers; of 9, 9, 28 and 28 three and one."""
    work = make_work([(4, 2, 2)] * 4, 2, 1)
    assert GPipe(recompute="late").plan(work, 0).devices[0][0].stop == 2
    costs = [
        each.model_copy(update={"forward_only_ns": 1 if number < 2 else 20})
        for number, each in enumerate(work.trace.layers)
    ]
    work = replace(work, trace=work.trace.model_copy(update={"layers": tuple(costs)}))
    assert work.together_ns("FRB") == [9, 9, 28, 28]
    assert GPipe(recompute="late").plan(work, 0).devices[0][0].stop == 3
    assert work.together_ns("FB") == [8] * 4
    assert GPipe().plan(work, 0).devices[0][0].stop == 2
    assert work.together_ns("F") == [1, 1, 20, 20]


def test_the_cut_knows_that_the_last_stage_recomputes_nothing_where_none_is_needed() -> None:
    """A layer takes 5, and 2 again where it is recomputed: 5 of 12 times 7 is 7 times 5."""
    work = make_work([(2, 2, 1)] * 12, 2, 4, recompute_ns=2)
    modes: tuple[Recompute, ...] = ("none", "early", "needed")
    stops = [OneFOneB(recompute=mode).plan(work, 0).devices[0][0].stop for mode in modes]
    assert stops == [6, 6, 5]
    stops = [ZBH1(recompute=mode).plan(work, 0).devices[0][0].stop for mode in modes]
    assert stops == [6, 6, 5]


BY_LAYER = {
    (OneFOneB, "early", 1): "0:5F0 4:5R0 4:5B0 3:4R0 3:4B0 2:3R0 2:3B0 1:2R0 1:2B0 0:1R0 0:1B0",
    (OneFOneB, "late", 2): "0:5F0 3:5R0 3:5B0 1:3R0 1:3B0 0:1R0 0:1B0",
    (GPipe, "early", 9): "0:5F0 0:5R0 0:5B0",
    (OneFOneB, "needed", 1): "0:5F0 0:5B0",
    (ZBH1, "early", 3): "0:5F0 2:5R0 2:5I0 0:2R0 0:2I0 2:5W0 0:2W0",
    (ZBH1, "needed", 3): "0:5F0 0:5I0 0:5W0",
}


@pytest.mark.parametrize(("kind", "recompute", "size"), BY_LAYER)
def test_layers_are_recomputed_so_many_at_a_time_right_before_their_backward(
    kind: type[OneFOneB], recompute: Recompute, size: int
) -> None:
    policy = kind(recompute=recompute, recompute_layers=size)
    (ops,) = policy.plan(make_work(5, 1, 1), 0).devices
    assert " ".join(map(str, ops)) == BY_LAYER[kind, recompute, size]


def test_of_other_layers_nothing_is_saved_while_one_is_recomputed() -> None:
    """Four layers that save 100 each besides their input of 1, and two microbatches."""
    work = make_work(4, 1, 2, saved_bytes=100, output_bytes=1)

    def peak(size: int | None) -> int:
        plan = GPipe(recompute="late", recompute_layers=size).plan(work, 0)
        curve, _ = simulate_program(lower([plan], work), "memory").memory
        return curve.peak_bytes

    assert peak(None) == 4 * 100 + 3
    # Inputs of later parts wait, of both microbatches; a gradient of one comes out of the last.
    assert peak(2) == 2 * 1 + (2 * 100 + 1) + 1
    assert peak(1) == 2 * 3 + 100 + 1


def test_the_cut_counts_what_each_layer_leaves_out_where_each_is_recomputed_alone() -> None:
    """18 a layer, but 11 of the first six: 4 x 18 | 4 x 18, or 5 x 11 | 11 + 2 x 18."""
    work = make_work([(8, 1, 1)] * 8, 2, 4)
    costs = [
        each.model_copy(update={"recompute_last_ns": 1 if number < 6 else None})
        for number, each in enumerate(work.trace.layers)
    ]
    work = replace(work, trace=work.trace.model_copy(update={"layers": tuple(costs)}))
    sizes = (None, 2, 1)
    plans = [GPipe(recompute="late", recompute_layers=size).plan(work, 0) for size in sizes]
    assert [plan.devices[0][0].stop for plan in plans] == [4, 4, 5]


def test_weight_gradients_of_every_microbatch_go_by_layers_too() -> None:
    (ops,) = ZBH1(recompute="early", recompute_layers=1).plan(make_work(2, 1, 2), 0).devices
    assert " ".join(map(str, ops)) == (
        "0:2F0 1:2R0 1:2I0 0:1R0 0:1I0 1:2W0 0:1W0 0:2F1 1:2R1 1:2I1 0:1R1 0:1I1 1:2W1 0:1W1"
    )


def test_it_does_nothing_without_recompute() -> None:
    with pytest.raises(InputError, match="gpipe: recompute_layers does nothing without recompute"):
        GPipe(recompute_layers=1).plan(make_work(3, 1, 1), 0)


@pytest.mark.parametrize(("size", "said"), [(0, "at least 1"), (True, "a whole number")])
def test_a_wrong_number_of_layers_is_refused(size: int, said: str) -> None:
    with pytest.raises(InputError, match=f"gpipe: recompute_layers: must be {said}"):
        GPipe(recompute="late", recompute_layers=size).plan(make_work(3, 1, 1), 0)
