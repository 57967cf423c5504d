"""The process's random numbers: torch's on the host and on devices, Python's and NumPy's."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .places import gpus_of


def random_state(devices: Iterable[torch.device]) -> dict[str, Any]:
    """What all later random numbers depend on, in plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(device): torch.cuda.get_rng_state(device) for device in gpus_of(devices)},
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers of a state; devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    for number in range(torch.cuda.device_count()):
        if f"cuda:{number}" in state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][f"cuda:{number}"], number)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
