"""Python while a step runs: its threads take short turns, and nothing stops them all."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0005
"""How long, during a step, a thread that runs Python keeps the others waiting that want to."""

NEVER = 2**31 - 1


@contextmanager
def undisturbed() -> Iterator[None]:
    """Threads take turns every `SWITCH_S` in here, and Python's collector leaves old objects alone.

    Going through all of them stops every thread, for 80 to 300 ms where torch and transformers are
    loaded; young ones, which a step's own garbage is among, are collected as always.
    """
    switching, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(*thresholds[:2], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(switching)
