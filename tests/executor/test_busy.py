"""Keeping GPUs busy, without one: what is measured beside them waits until they are."""

import time
from collections.abc import Iterator

import pytest
import torch

from roundel.executor import busy

GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_all_are_busy_in_there_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    done = dict.fromkeys(GPUS, 0)

    def rounds(gpu: torch.device) -> Iterator[None]:
        time.sleep(0.05)
        while True:
            done[gpu] += 1
            yield

    monkeypatch.setattr(busy, "_rounds", rounds)
    with busy.kept_busy(GPUS):
        assert all(done.values())
    after = dict(done)
    time.sleep(0.02)
    assert done == after


def test_what_goes_wrong_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(gpu: torch.device) -> Iterator[None]:
        yield
        raise RuntimeError(f"no luck on {gpu}")

    monkeypatch.setattr(busy, "_rounds", rounds)
    with pytest.raises(RuntimeError, match="no luck on cuda:0"):
        with busy.kept_busy(GPUS):
            time.sleep(0.02)
