"""Python while a step runs: its threads take short turns."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0005
"""How long, during a step, a thread that runs Python keeps the others waiting that want to."""

_lock = threading.Lock()
_before: list[float] = []


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns every `SWITCH_S` while anybody is in here; then as they did before."""
    with _lock:
        _before.append(_before[0] if _before else sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        with _lock:
            interval = _before.pop()
            if not _before:
                sys.setswitchinterval(interval)
