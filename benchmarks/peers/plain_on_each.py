"""Plain PyTorch on every device at once: a model of its own for each, with nothing to share.

What several GPUs of one host can do at most. Each may be slower than alone: they share the host's
power, memory and cores.
"""

import argparse
from copy import copy

from training_common import Result, devices_of

from .plain import plain
from .ranks import run_ranks, wait_for_all


def train(_: str, arguments: argparse.Namespace) -> Result:
    """All begin each count of steps together; the tokens are those of all."""
    result = run_ranks(_train, arguments, capped=False)
    result["tokens_per_s"] *= len(devices_of(arguments))
    return result


def _train(rank: int, arguments: argparse.Namespace) -> Result:
    mine = copy(arguments)
    mine.devices = arguments.devices.split(",")[rank]
    return plain(mine, wait_for_all)
