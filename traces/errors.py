"""The user's mistakes, in one line each."""

import json
from pathlib import Path


class InputError(ValueError):
    """A wrong input. Its message is one line that says what is wrong and what to do."""


class CannotFit(InputError):
    """A plan needs more memory than there is."""


def shown(path: str | Path) -> str:
    """The name of a file as one printable line."""
    return escaped(str(path))


def escaped(text: str) -> str:
    """A text as one printable line."""
    return text if text.isprintable() else json.dumps(text)[1:-1]
