"""Sizes of memory as people write them."""

import re

from ..traces.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str | None, name: str = "memory") -> int:
    """Bytes of `24GiB`, `500 MB` or a number; None is 0, no limit.

    Raises InputError, which calls what was given `name`.
    """
    if size is None:
        return 0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise InputError(f'{name}: write bytes, or a size such as "24GiB", got {size!r}')
    return int(float(match.group(1)) * unit)


def say_bytes(count: int) -> str:
    """Bytes in GiB, or where they are few in MiB or KiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
