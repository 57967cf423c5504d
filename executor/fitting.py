"""Whether a plan fits the memory, said before its first step and where it ran out all the same."""

from ..policies.estimate import estimated_memory
from ..policies.lowering import lower
from ..policies.misfit import misfit
from ..policies.plan import Plan
from ..policies.planning import plan_of
from ..policies.policy import Policy, policy_name
from ..policies.program import Program
from ..policies.work import Work
from ..traces.errors import CannotFit
from .sizes import say_bytes


def refuse_what_cannot_fit(policy: Policy, plan: Plan, work: Work, step: int) -> None:
    """Raises CannotFit where the plan of step number `step` needs more memory than there is."""
    plans = [plan]
    if plan.outlasts_step:
        # A step begins while the one before it ends: both need room.
        plans += [plan_of(policy, work, step + 1)]
    curves = estimated_memory(lower(plans, work), policy_name(policy))
    over = [curve for curve in curves if curve.over_bytes]
    if over:
        worst = max(over, key=lambda each: each.over_bytes)
        raise CannotFit(f"this plan cannot fit: {misfit(worst, plan, say_bytes)}")


def expected_memory(program: Program, limit_bytes: int, step: int) -> str:
    """What a plan was expected to need, for whoever sees it run out."""
    peaks = [curve.peak_bytes for curve in estimated_memory(program, "expected")[:-1]]
    limit = say_bytes(limit_bytes) if limit_bytes else "all there is"
    return (
        f"in step {step}: expected at most {say_bytes(max(peaks))} on a device, "
        f"allowed {limit}; "
        "use more microbatches, a finer cut, recompute, or streamed weights (round-robin)"
    )
