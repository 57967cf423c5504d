"""Which ranges of a profiler export are layers."""

import re

from .errors import InputError
from .kineto_file import Export, Kind

LAYERS = r"(?i)(?:roundel\.)?layers?\.|.*(?:layer|block)s?[._ ]?\d+$"
"""The ranges that are layers where nobody says: `layer.3`, `roundel.layer.head`, `Block_3`."""

_RANGES: tuple[Kind, ...] = ("range", "module")
_SHOWN = 6


def layer_ranges(export: Export, pattern: str, where: str) -> dict[tuple[Kind, str], str]:
    """The layer's name for each kind and name of a range that is a layer.

    A name matches if it begins with what `pattern` describes; a group in `pattern` picks the
    layer's name. Modules are asked only where no `record_function` range matches. `where` names
    the file. Raises InputError if nothing matches, or if `pattern` is no regular expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--layers: {pattern!r} is no regular expression: {error}") from None
    for kind in _RANGES:
        names = {event.name for event in export.events if event.kind == kind}
        matches = [match for name in names if (match := expression.match(name))]
        if matches:
            return {(kind, match.string): _layer_name(match) for match in matches}
    raise InputError(f"{where}: no range matches {pattern!r}; {_what_to_do(export)}")


def _layer_name(match: re.Match[str]) -> str:
    group = match.group(1) if match.re.groups else None
    return group or match.string.removeprefix("roundel.layer.")


def _what_to_do(export: Export) -> str:
    names = sorted({event.name for event in export.events if event.kind in _RANGES})
    has = ", ".join(map(repr, names[:_SHOWN])) or "none"
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    modules = any(event.kind == "module" for event in export.events)
    hint = "" if modules else " (or profile with_stack=True, which records modules)"
    return (
        f"run each layer in record_function('layer.N'){hint}, or say with --layers what the names "
        f"of yours begin with; the ranges here: {has}{more}"
    )
