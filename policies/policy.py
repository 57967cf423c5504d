"""Policy: the protocol that every schedule follows, the user's own too."""

from typing import Protocol, runtime_checkable

from .plan import Plan
from .work import Work


@runtime_checkable
class Policy(Protocol):
    """A schedule. An immutable object; its fields are its knobs.

    `plan` is a pure function of its arguments: no clock, no randomness, no global.
    Raises InputError when the work does not suit the policy.
    """

    def plan(self, work: Work, step: int) -> Plan:
        """The plan of step number `step` (from 0)."""
        ...


def policy_name(policy: Policy) -> str:
    """What a policy is called: its `name` if it has one, else its class's."""
    name = getattr(policy, "name", None)
    return name if isinstance(name, str) else type(policy).__name__
