"""plan_of: a policy's plan, with the mistakes of a user's own policy said in one line."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..traces.errors import InputError
from .plan import Plan
from .policy import Policy, policy_name
from .user_file import failure
from .work import Work


def plan_of(policy: Policy, work: Work, step: int) -> Plan:
    """The plan of one step. Raises InputError for whatever the policy does wrong."""
    check_knobs(policy)
    try:
        # What a policy prints must not get into output that programs read.
        with redirect_stdout(sys.stderr):
            plan = policy.plan(work, step)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{policy_name(policy)}: plan failed: {failure(error)}") from error
    if not isinstance(plan, Plan):
        raise InputError(
            f"{policy_name(policy)}: plan must return a Plan, it returned {type(plan).__name__}"
        )
    return plan


def check_knobs(policy: Policy) -> None:
    """Raises InputError where a knob's value is not of the type that the policy declares."""
    if not is_dataclass(policy):
        return
    for knob, adapter in _adapters(type(policy)).items():
        try:
            adapter.validate_python(getattr(policy, knob))
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise InputError(
                f"{policy_name(policy)}: {knob}: {message}, got {getattr(policy, knob)!r}"
            ) from None


@lru_cache(maxsize=256)
def _adapters(policy: type) -> dict[str, TypeAdapter[Any]]:
    """A strict check for each knob whose type is known."""
    try:
        hints = get_type_hints(policy)
        strict = ConfigDict(strict=True)
        return {
            field.name: TypeAdapter(hints[field.name], config=strict)
            for field in fields(policy)
            if field.init
        }
    except Exception:
        # A user's annotations may be anything; then the policy checks its knobs itself.
        return {}
