"""On GPUs the machine is measured once for all tests, not by every trainer anew."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from roundel.executor import trainer
from roundel.executor.measure_machine import measure_machine
from roundel.traces.machine import Machine


@lru_cache
def _measured(devices: tuple[torch.device, ...]) -> Machine:
    return measure_machine(devices, [0] * len(devices), torch.optim.AdamW)


def _once(devices: list[torch.device], *given: Any, host_memory_bytes: int, **options: Any) -> Any:
    return _measured(tuple(devices)).with_memory(0, host_memory_bytes)


@pytest.fixture(autouse=True)
def _machine_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "measure_machine", _once)
