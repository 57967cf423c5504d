"""Chunks: layers' weights move in pieces of this size."""

import numpy as np
from numpy.typing import NDArray

from ..traces.timeline import Ints

CHUNK_BYTES = 64 * 2**20
"""Weights are cut into chunks of this size, so that an activation can pass between them."""


def chunks_of(nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of chunks of each of these."""
    return -(-nbytes // CHUNK_BYTES)


def chunked(
    nbytes: NDArray[np.int64], parts: Ints
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, part, bytes) of every part of these rows, each in as many parts as `parts` says."""
    row = np.repeat(np.arange(len(nbytes)), parts)
    part = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    size = np.where(parts == 1, nbytes, CHUNK_BYTES)[row]
    return row, part, np.minimum(size, nbytes[row] - part * size)
