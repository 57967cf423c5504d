"""Kills processes while they save: `killed.py HOW FOLDER`. Exits with 0 where all went well.

Children are forked, so that torch is imported once; a child that is killed has no chance to tidy.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import roundel
from roundel.executor.checkpoint import latest
from roundel.executor.trainer import Trainer

torch.set_num_threads(1)
KILLS, MOST_S = 15, 0.1


def blocks(count: int) -> list[nn.Module]:
    torch.manual_seed(1)
    return [
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)).double() for _ in range(count)
    ]


def make() -> Trainer:
    return Trainer(
        blocks(4),
        nn.functional.mse_loss,
        policy=roundel.RoundRobin((2,), (2, 2), optimizer="stale"),
        optimizer=torch.optim.AdamW,
        devices=["cpu"] * 2,
        microbatches=2,
        seed=3,
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(2, 4, 6, generator=numbers, dtype=torch.double)
    return inputs, targets


def fork(work: Callable[[], Any]) -> int:
    """Run in a child, which ends with it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


# ---- at random


def train_and_save(folder: Path, report: int) -> None:
    """Go on where the last one was killed, save after every step, and report what is saved."""
    trainer = make()
    step = trainer.load(folder) if latest(folder) else 0
    while True:
        inputs, targets = batch(step)
        loss = trainer.step(inputs, targets).loss
        step += 1
        trainer.save(folder)
        os.write(report, f"{step} {loss!r}\n".encode())


def kill_at_random(folder: Path) -> None:
    """A training killed many times is the one never killed, and loses nothing that was saved."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    numbers = random.Random(seed)
    losses: dict[int, str] = {}
    lives = step = 0
    while lives < KILLS or len(losses) < KILLS:
        lives += 1
        read, write = os.pipe()
        child = fork(lambda write=write: train_and_save(folder, write))
        os.close(write)
        time.sleep(numbers.random() * MOST_S * (1 + lives / KILLS))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
        with os.fdopen(read) as report:
            losses |= {int(line.split()[0]): line.split()[1] for line in report}
        # A child may have been killed between the end of a save and its report.
        done = max(step, *losses, 0)
        path = latest(folder)
        step = make().load(folder) if path else 0
        assert step in (done, done + 1), f"{done} steps were saved, {path} is there"
    with make() as trainer:
        for number in range(1, max(losses) + 1):
            loss = trainer.step(*batch(number - 1)).loss
            assert losses.get(number, repr(loss)) == repr(loss), f"step {number} differs"
    print(f"{max(losses)} steps in {lives} lives")


# ---- before each operation on files

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def kill_before(number: int) -> None:
    """Let this process be killed before its operation number `number` on files."""
    left = [number]

    def hook(event: str, _: object) -> None:
        if event in OPERATIONS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def trainer_at(step: int, value: int) -> Trainer:
    """A trainer whose weights and optimizer state are all `value`."""
    trainer = make()
    trainer.step_number = step
    for _, each in trainer.layers.named_parameters():
        each.detach().fill_(value)
        trainer.optimizer.state[each] = {"exp_avg": torch.full_like(each, value)}
    return trainer


def loaded(folder: Path) -> tuple[int, int]:
    """The step of the checkpoint in a folder, and the value that weights and state all have."""
    trainer = make()
    step = trainer.load(folder)
    parameters = [each for _, each in trainer.layers.named_parameters()]
    states = [trainer.optimizer.state[each]["exp_avg"] for each in parameters]
    values = {int(value) for each in (*parameters, *states) for value in each.flatten().tolist()}
    assert len(values) == 1, f"of several saves: {values}"
    return step, values.pop()


def kill_before_each_operation(folder: Path, now: tuple[int, int]) -> None:
    """Whatever operation a save is killed before, the checkpoint before it or its own is there."""
    template, place = folder / "template", folder / "place"
    before = (2, 20)
    trainer_at(1, 10).save(template)
    trainer_at(*before).save(template)

    def save(number: int) -> None:
        trainer = trainer_at(*now)
        kill_before(number)
        trainer.save(place)

    results = []
    for number in range(1000):
        shutil.copytree(template, place)
        end = os.waitpid(fork(lambda number=number: save(number)), 0)[1]
        assert end in (0, signal.SIGKILL), "the child ended by itself"
        results.append(loaded(place))
        trainer_at(9, 90).save(place)
        assert loaded(place) == (9, 90)
        left = sorted(path.name for path in place.iterdir())
        assert len(left) == 2, f"killed before operation {number}: {left}"
        shutil.rmtree(place)
        if end == 0:
            break
    changed = results.index(now)
    assert results == [before] * changed + [now] * (len(results) - changed)
    assert 0 < changed < len(results) - 2, "kills before and after the moment that counts"
    print(f"{changed} of {len(results)} operations before the new one is there")


def main(how: str, folder: Path) -> None:
    make()  # What torch imports at its first use, children need not.
    if how == "at random":
        kill_at_random(folder)
    else:
        kill_before_each_operation(folder, (2, 21) if how == "replacing" else (3, 30))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
