"""Policy: the protocol that every schedule follows, the user's own too."""

from collections.abc import Iterable
from typing import Protocol, get_args, runtime_checkable

from .plan import Place, Plan
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


def places_of_updates(policies: Iterable[Policy]) -> set[Place]:
    """Where updates may run: as each one's `optimizer_on` says, either place where one has none."""
    anywhere: set[Place] = set(get_args(Place))
    said = [getattr(each, "optimizer_on", None) for each in policies]
    return anywhere if None in said else anywhere.intersection(said)
