"""Output files: the mistakes one can make with their paths, in one line each."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile

from ..traces.errors import InputError

PICTURES = (".png", ".svg", ".pdf")
"""How files of pictures may end."""

CHROME_TRACES = (".json", ".gz")
"""How files of Chrome traces may end."""

LONGEST_STEM = 80
"""Characters of a file's name that come from a policy's, whose knobs can be long cuts."""


def output_path(path: str | Path, what: str, suffixes: Collection[str] = ()) -> Path:
    """`path`, ready to be written to.

    Raises InputError where its folder is not there, it is a folder, or its suffix is none of
    `suffixes` (empty: any). `what` names the kind of file.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: cannot write this {what}: name it {' or '.join(suffixes)}")
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
    except OSError as error:
        raise InputError(f"cannot write this {what}: {error.strerror}") from None
    if is_folder:
        raise InputError(f"{path}: cannot write this {what}: it is a folder; name a file in it")
    if not has_folder:
        raise InputError(f"{path}: cannot write this {what}: there is no folder {path.parent}")
    return path


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """A file's name for each name of a policy: short, of plain signs, and its own."""
    stems: dict[str, str] = {}
    for name in names:
        stem = "-".join(part for part in re.split(r"[^\w.-]+", name) if part)[:LONGEST_STEM]
        numbered = (f"{stem}-{number}" for number in count(2))
        taken = stems.values()
        stems[name] = next(each for each in chain([stem], numbered) if each not in taken)
    return stems


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Turn the system's refusals to write `path` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot write this {what}: {error.strerror}") from None


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, where it is not there; what is to be written there
    later must be able to. Raises InputError."""
    if folder.suffix.lower() in PICTURES:
        raise InputError(f"{folder}: is to be a folder; name one for all the pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder: {error.strerror}") from None
    try:
        try_to_write(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot write to this folder: {error.strerror}") from None


def try_to_write(folder: Path) -> None:
    """Raises OSError where no file can be made in a folder."""
    with TemporaryFile(dir=folder):
        pass
