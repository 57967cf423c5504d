"""A user's policy that is wrong is refused in one line that says where."""

from dataclasses import dataclass
from typing import Any

import pytest

import roundel
from roundel.policies.plan import Plan
from roundel.policies.planning import plan_of
from roundel.policies.policy import places_of_updates
from roundel.policies.work import Work
from roundel.traces.errors import InputError

from ..costs import make_work


class Returns:
    """A policy whose plan is whatever it was given."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    def plan(self, work: roundel.Work, step: int) -> Any:
        return self._plan() if callable(self._plan) else self._plan


def boom() -> None:
    raise KeyError("lost")


def leave() -> None:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "Returns: plan must return a Plan, it returned NoneType"),
        ([], "plan must return a Plan, it returned list"),
        (boom, r"Returns: plan failed: test_planning.py line \d+: KeyError: 'lost'"),
        (leave, "plan failed: .*SystemExit: 7"),
    ],
)
def test_what_is_no_plan(plan: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_of(Returns(plan), make_work(2, 1, 1), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "op",
    [
        ("f", 0, 2, 0),
        ("FB", 0, 2, 0),
        ("", 0, 2, 0),
        (None, 0, 2, 0),
        ("F", 0, 2),
        ("F", 0, 2, "0"),
        ("F", 0, 2, 0.5),
        ("F", 0, None, 0),
        "0:2F0",
        7,
    ],
)
def test_what_is_no_op(op: Any) -> None:
    plan = roundel.Plan(((op, roundel.Op("B", 0, 2, 0)),))
    with pytest.raises(InputError, match=r"gpu0: not an op: .* must be Op") as caught:
        plan.check(make_work(2, 1, 1))
    assert "\n" not in str(caught.value)


def test_a_plain_tuple_is_an_op_too() -> None:
    roundel.Plan(((("F", 0, 2, 0), ("B", 0, 2, 0)),)).check(make_work(2, 1, 1))


@pytest.mark.parametrize("devices", [None, 7, (None,), "F"])
def test_what_is_no_list_of_ops(devices: Any) -> None:
    with pytest.raises(InputError):
        roundel.Plan(devices).check(make_work(2, 1, 1))


@pytest.mark.parametrize(
    "rules",
    [
        {"weights": "elsewhere"},
        {"optimizer": "never"},
        {"optimizer_on": "moon"},
        {"activations": "moon"},
        {"clip": "yes"},
        {"weight_share": -3},
        {"weight_share": "half"},
    ],
)
def test_what_is_no_rule(rules: dict) -> None:
    (name,) = rules
    with pytest.raises(InputError, match=f"plan: {name} must be"):
        roundel.Plan((), **rules)


def test_rules_may_not_change_from_step_to_step() -> None:
    @dataclass(frozen=True)
    class Changes:
        def plan(self, work: roundel.Work, step: int) -> roundel.Plan:
            place = "host" if step else "device"
            return roundel.GPipe(optimizer_on=place).plan(work, step)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="the plans of all steps must have the same rules"):
        roundel.api.simulate_work(make_work(2, 1, 1), Changes(), steps=2)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (roundel.GPipe(partition=7), "gpipe: partition: Input should be a valid tuple"),  # type: ignore[arg-type]
        (roundel.GPipe(recompute="banana"), "gpipe: recompute: Input should be 'none'"),  # type: ignore[arg-type]
        (roundel.LoopedBFS(chunks=2.0), "looped-bfs: chunks: Input should be a valid integer"),  # type: ignore[arg-type]
        (roundel.RoundRobin(clip=[[]]), "round-robin: clip: Input should be a valid boolean"),  # type: ignore[arg-type]
        (roundel.RoundRobin(round_size=0), "round_size: must be at least 1"),
    ],
)
def test_knobs_of_another_type_are_refused(policy: roundel.Policy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        roundel.simulate("qwen3-1.7b-rtx4090", policy, devices=2, microbatches=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"microbatches": 2.5}, "microbatches: must be a whole number, got 2.5"),
        ({"microbatches": 10**20}, "microbatches: must be at most 1,000,000"),
        ({"devices": 10**20}, "devices: must be at most 4,096"),
        ({"devices": "2"}, "devices: must be a whole number"),
        ({"steps": 10**9}, "steps: must be at most 10,000"),
        ({"hop_ns": 0.5}, "hop_ns: must be whole nanoseconds"),
        ({"microbatches": 10**6, "steps": 100}, "ops are too many"),
    ],
)
def test_sizes_that_would_never_end(arguments: dict, message: str) -> None:
    given = {"devices": 2, "microbatches": 2, **arguments}
    with pytest.raises(InputError, match=message):
        roundel.simulate("qwen3-1.7b-rtx4090", "gpipe", **given)


def test_prints_of_a_policy_stay_out_of_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    def prints() -> roundel.Plan:
        print("hello")
        return roundel.Plan(())

    plan_of(Returns(prints), make_work(2, 1, 1), 0)
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "hello\n")


def test_where_updates_may_run() -> None:
    """As policies say; a user's own that does not say may plan either."""

    class Own:
        def plan(self, work: Work, step: int) -> Plan:
            raise NotImplementedError

    sync = roundel.RoundRobin()
    assert places_of_updates([sync]) == {"host"}
    assert places_of_updates([sync, roundel.GPipe()]) == {"host", "device"}
    assert places_of_updates([roundel.RoundRobin(optimizer_on="device")]) == {"device"}
    assert places_of_updates([sync, Own()]) == {"host", "device"}
