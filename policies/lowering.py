"""lower: plans of one or more steps become a Program. The rules are in the files it calls."""

from collections.abc import Sequence

from ..traces.errors import InputError
from .builder import ProgramBuilder
from .check import MOST_OPS, check_ops, check_size, check_table, check_visits
from .lower_activations import lower_activations, lower_gradient_flows
from .lower_compute import lower_compute
from .lower_optimizer import lower_optimizer
from .lower_weights import lower_weights
from .order import order_of
from .plan import Plan
from .planning import plan_of
from .policy import Policy
from .program import Program
from .table import OpTable
from .visits import Visits
from .work import Work


def lower(plans: Sequence[Plan], work: Work) -> Program:
    """The program that runs one plan a step, back to back.

    Raises InputError naming the op when a plan is incomplete, wrong or can deadlock.
    """
    rules = plans[0].without_ops()
    for different in {id(plan): plan for plan in plans}.values():
        check_ops(different, work)
        if different.without_ops() != rules:
            raise InputError("the plans of all steps must have the same rules; only ops may differ")
    check_size(plans, work)
    table = OpTable.of(plans, work)
    steps = table.steps
    del (
        plans,
        different,
    )  # At millions of ops, what is no longer needed is let go as soon as it can be.
    check_table(table)
    visits = Visits.of(table)
    check_visits(table, visits)
    order = order_of(table, visits)
    builder = ProgramBuilder(work)
    lower_compute(builder, table, order)
    lower_activations(builder, table, visits, order)
    lower_gradient_flows(builder, table, order)
    updated = lower_optimizer(builder, table, visits, order)
    lower_weights(builder, table, visits, order, updated)
    del table, visits, order, updated
    return builder.build(rules, steps)


def lower_policy(policy: Policy, work: Work, steps: int = 1) -> Program:
    """The program of `steps` steps of a policy. Raises InputError."""
    least = 2 * work.microbatches * work.devices * steps
    if least > MOST_OPS:
        raise InputError(f"{least:,} ops are too many; {MOST_OPS:,} at most: fewer steps")
    return lower([plan_of(policy, work, step) for step in range(steps)], work)
