"""Folders of which each is whole or not there, whatever moment the process is killed at.

One is written beside its place as `NAME.partial`, synced and then renamed. One that is replaced is
`NAME.old` for the moment between two renames, and one that is deleted is `NAME.partial` first.
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

CHUNK_BYTES = 2**24

_LEFT_OVER = r"(?:\.old)?\.partial"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Make or replace the folder `path` by one that `write` fills. Raises what that raises."""
    unfinished, old = _beside(path, ".partial"), _beside(path, ".old")
    try:
        unfinished.mkdir()
        write(unfinished)
        for each in [*unfinished.iterdir(), unfinished]:
            sync(each)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if path.exists():
        discard(old)
        path.rename(old)
    unfinished.rename(path)
    sync(path.parent)
    discard(old)


def discard(path: Path) -> None:
    """Delete a folder, if it is there, so that it is never half there under its name."""
    if path.exists():
        doomed = _beside(path, ".partial")
        path.rename(doomed)
        shutil.rmtree(doomed)


def whole_folders(folder: Path, name: str) -> list[Path]:
    """The whole folders in `folder` whose names match the pattern `name`, replaced ones too."""
    return _matching(folder, rf"(?:{name})(?:\.old)?")


def clean(folder: Path, name: str) -> None:
    """Delete what killed processes left of folders whose names match the pattern `name`."""
    for path in _matching(folder, rf"(?:{name}){_LEFT_OVER}"):
        shutil.rmtree(path)


def _matching(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """The CRC-32 of the CRC-32s of a file's chunks; large files are read by several threads."""
    starts = range(0, path.stat().st_size, CHUNK_BYTES)
    if len(starts) < 2:
        sums = [_checksum_of_chunk(path, start) for start in starts]
    else:
        with ThreadPoolExecutor(thread_name_prefix="roundel checksum") as pool:
            sums = list(pool.map(partial(_checksum_of_chunk, path), starts))
    return zlib.crc32(b"".join(each.to_bytes(4, "little") for each in sums))


def _checksum_of_chunk(path: Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(CHUNK_BYTES))
