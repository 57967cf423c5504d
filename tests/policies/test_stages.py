"""What a policy with fixed placement refuses, in one line that says what to do."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from roundel.policies.gpipe import GPipe
from roundel.policies.interleaved_1f1b import Interleaved1F1B
from roundel.policies.looped_bfs import LoopedBFS
from roundel.policies.one_f_one_b import OneFOneB
from roundel.policies.plan import Plan, Recompute
from roundel.policies.work import Work
from roundel.policies.zb_h1 import ZBH1
from roundel.policies.zb_v import ZBV
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
