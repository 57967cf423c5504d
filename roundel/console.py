"""What all commands print and show by: plain lines, and a spinner for whoever waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Tell = Callable[[str], None]
"""Told of what is being worked on."""


@contextmanager
def busy(what: str, console: Console) -> Iterator[Tell]:
    """A spinner on a terminal, nothing elsewhere; what it yields changes what it says."""
    if not console.is_terminal:
        yield lambda what: None
        return
    with console.status(what) as status:
        yield status.update


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
