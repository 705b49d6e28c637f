"""huffman.c; every array is contiguous."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

def encode(chunks: Array, checksum: bool, sizes: Array, room: Array, /) -> int:
    """zstd frames of `chunks` (chunk, ...), of one byte a number, into `room` (...,) uint8; their bytes.

    sizes (chunk,) int64: filled with each one's. ValueError where `room` is too small.
    """

def room(chunks: int, size: int, /) -> int:
    """Bytes that `encode` asks for, for so many chunks of so many bytes."""
