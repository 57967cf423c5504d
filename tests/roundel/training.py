"""What the tests of `roundel train` share: a text, models in a file, and how to run it."""

import json
import shlex
from pathlib import Path

import pytest

from roundel.cli import main

SMALL = "decoder-tiny --devices cpu,cpu --batch 8 --sequence 32 --data {text}"
EXAMPLES = Path(__file__).parents[2] / "examples"

SPACES = {"type": "Whitespace"}

FILE = '''
import threading

import torch
from torch import nn


class Fails(nn.Module):
    """Raises at its second run on a lane, not while it is measured."""

    def __init__(self, error):
        super().__init__()
        self.inner, self.error, self.runs = nn.Linear(8, 8), error, 0

    def forward(self, value):
        self.runs += threading.current_thread().name.startswith("roundel ")
        if self.runs == 2:
            raise self.error
        return self.inner(value)


def layers(*middle):
    return [nn.Embedding(256, 8), nn.Linear(8, 8), *middle, nn.Linear(8, 256)]


def good():
    return layers(nn.Tanh())


def with_loss():
    def loss(logits, targets):
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 100

    return layers(), loss


def failing():
    return layers(Fails(KeyError("no luck")))


def full():
    return layers(Fails(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has 1.")))


def not_a_number():
    def loss(logits, targets):
        return logits.mean() * float("nan" if targets[0, 0] >= 0 else 0)

    return layers(), loss


def nothing():
    return 3


def broken():
    raise RuntimeError("cannot")


class Numbers:
    def __init__(self, batch, sequence, seed):
        self.size = batch, sequence

    def batch(self, step):
        tokens = torch.full(self.size, step % 256)
        return tokens, tokens

    def held_out(self, count, size):
        return [(torch.full((size, 4), 1),) * 2] * count
'''


def text_in(folder: Path) -> Path:
    """A text that is easy to learn."""
    path = folder / "text.txt"
    path.write_text("".join(f"{number} times two is {2 * number}.\n" for number in range(3000)))
    return path


def models_in(folder: Path) -> Path:
    """A file with functions that make models and data, good ones and others."""
    path = folder / "models.py"
    path.write_text(FILE)
    return path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `roundel train` and a line of arguments."""
    with pytest.raises(SystemExit) as stop:
        main(["train", *shlex.split(line)])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def words(folder: Path) -> Path:
    """A tokenizer whose tokens are beyond bytes."""
    path = folder / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"?": 300}, "unk_token": "?"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": SPACES, "model": model}))
    return path


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
