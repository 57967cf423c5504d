"""The policies by name, and a user's own from a file."""

from ast import literal_eval
from dataclasses import fields, is_dataclass
from inspect import isabstract, signature
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from ..traces.errors import InputError, shown
from .gpipe import GPipe
from .interleaved_1f1b import Interleaved1F1B
from .layer_to_layer import LayerToLayer
from .looped_bfs import LoopedBFS
from .one_f_one_b import OneFOneB
from .planning import check_knobs
from .policy import Policy
from .round_robin import RoundRobin
from .user_file import failure, run_file
from .zb_h1 import ZBH1
from .zb_h2 import ZBH2
from .zb_v import ZBV

POLICIES: dict[str, type] = {
    policy.name: policy
    for policy in (
        GPipe,
        OneFOneB,
        Interleaved1F1B,
        LoopedBFS,
        ZBH1,
        ZBH2,
        ZBV,
        RoundRobin,
        LayerToLayer,
    )
}
"""Every policy of the package, by its command-line name."""


def make_policy(name: str, **knobs: object) -> Policy:
    """The policy called `name`, or the class of a `file.py:Class`, with its knobs set.

    The name may bring knobs of its own, which come first: "round-robin[optimizer=stale]".
    Raises InputError for an unknown name or knob, and for a file or class that is of no use.
    """
    name, own = split_knobs(name)
    knobs |= own
    policy = _find(name)
    known = known_knobs(policy)
    for knob in knobs:
        if knob not in known:
            raise InputError(f"{name}: no knob {knob!r}; {_listed(known)}")
    _check_needs_no_more(name, policy, knobs)
    try:
        made = cast(Policy, policy(**knobs))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}: cannot be made: {failure(error)}") from error
    check_knobs(made)
    return made


def split_names(text: str) -> list[str]:
    """The names in a list with commas between; what stands in brackets is a name's own."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]


def split_knobs(text: str) -> tuple[str, dict[str, Any]]:
    """A policy's name and the knobs that stand behind it: "1f1b[partition=3 4, recompute=late]".

    A partition of two cuts, "7 7 / 1 3 10", is forward's and backward's. Raises InputError for
    one that is no NAME=VALUE, or is there twice.
    """
    name, bracket, rest = text.partition("[")
    if not bracket or not rest.endswith("]"):
        return text, {}
    knobs: dict[str, Any] = {}
    for each in split_names(rest[:-1]):
        for knob, value in _cuts_apart(*parse_knob(each)):
            if knob in knobs:
                raise InputError(f"{text}: {knob} is there twice")
            knobs[knob] = _numbers(value) if knob.endswith("partition") else value
    return name.strip(), knobs


def _cuts_apart(knob: str, value: Any) -> list[tuple[str, Any]]:
    if knob != "partition" or "/" not in str(value):
        return [(knob, value)]
    forward, _, backward = str(value).partition("/")
    return [(knob, forward), (f"backward_{knob}", backward)]


def parse_knob(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is Python's, true or false, or text. Raises InputError."""
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not equals or not name.isidentifier():
        raise InputError(f"write NAME=VALUE, got {text!r}")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


def _numbers(value: Any) -> Any:
    """A cut that is written as several numbers, or one, as a tuple."""
    words = str(value).split()
    short = all(word.isdecimal() and len(word) < 10 for word in words)
    return tuple(map(int, words)) if words and short else value


def known_knobs(policy: str | type) -> tuple[str, ...]:
    """The names of a policy's knobs: its dataclass fields."""
    found = _find(split_knobs(policy)[0]) if isinstance(policy, str) else policy
    if not is_dataclass(found):
        return ()
    return tuple(knob.name for knob in fields(found) if knob.init)


def _find(name: str) -> type:
    if name in POLICIES:
        return POLICIES[name]
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(
            f"no policy {name!r}; the policies are {', '.join(POLICIES)}, or file.py:Class"
        )
    return _policy_class(_load(Path(path)), class_name, shown(path))


def _load(path: Path) -> ModuleType:
    """The module in a user's file, run anew."""
    if not _is_file(path):
        raise InputError(f"{shown(path)}: no such policy file")
    try:
        return run_file(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InputError(f"{shown(path)}: {failure(error, path)}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _policy_class(module: ModuleType, name: str, path: str) -> type:
    policy = getattr(module, name, None)
    if not isinstance(policy, type):
        own = [key for key, value in vars(module).items() if _is_own_policy(value, module)]
        found = f"its policies are {', '.join(own)}" if own else "it defines no policy"
        raise InputError(f"{path}: no class {name!r}; {found}")
    if not callable(getattr(policy, "plan", None)) or isabstract(policy):
        raise InputError(f"{path}: {name} is no policy: it must define plan(self, work, step)")
    return policy


def _is_own_policy(value: object, module: ModuleType) -> bool:
    return (
        isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "plan")
    )


def _check_needs_no_more(name: str, policy: type, knobs: dict[str, object]) -> None:
    try:
        signature(policy).bind(**knobs)
    except TypeError as error:
        raise InputError(
            f"{name}: the class must be usable without arguments, give each a default: {error}"
        ) from None


def _listed(knobs: tuple[str, ...]) -> str:
    return f"its knobs are {', '.join(knobs)}" if knobs else "it has none"
