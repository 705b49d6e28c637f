"""Bytes that are noise but for how often each occurs, as zstd frames of their Huffman codes alone.

huffman.c makes them. Where nothing could be compiled, and of few bytes, the library does, with 64 places for
the hashes of its search, which then finds hardly a match: frames of other bytes, which decode to the same.
"""

import threading
from functools import partial

import numpy as np
import numpy.typing as npt
from zstandard import STRATEGY_FAST, ZstdCompressionParameters, ZstdCompressor

from .compiled import COMPILED
from .per_thread import PerThread

if COMPILED:
    from . import _huffman

Noise = npt.NDArray[np.int8] | npt.NDArray[np.uint8]

FEW = 1 << 14
"""Bytes of a chunk below which a code of its own is worth more than the time that it takes."""

_LOCAL = threading.local()


def encode_noise(chunks: Noise, checksum: bool) -> tuple[list[int], bytes | memoryview]:
    """Sizes of the frames of `chunks` (chunk, ...), and the frames, one behind the other, in memory that this
    thread's next call uses again."""
    if not COMPILED or chunks[0].size < FEW:
        frames = [_LIBRARY[checksum]().compress(np.ascontiguousarray(chunk).data) for chunk in chunks]
        return [len(frame) for frame in frames], b"".join(frames)
    return encode_together(chunks, checksum)


def encode_together(chunks: Noise, checksum: bool) -> tuple[list[int], memoryview]:
    """By huffman.c: they share one code, each with its description."""
    sizes = np.empty(len(chunks), np.int64)
    room = _room(_huffman.room(len(chunks), chunks[0].size))
    used = _huffman.encode(np.ascontiguousarray(chunks), checksum, sizes, room)
    return sizes.tolist(), room.data[:used]


def _room(size: int) -> npt.NDArray[np.uint8]:
    """This thread's; new memory costs a page fault every 4 KiB."""
    if len(getattr(_LOCAL, "room", b"")) < size:
        _LOCAL.room = np.empty(size, np.uint8)
    room: npt.NDArray[np.uint8] = _LOCAL.room
    return room


def _library(checksum: bool) -> ZstdCompressor:
    return ZstdCompressor(
        compression_params=ZstdCompressionParameters(
            strategy=STRATEGY_FAST,
            window_log=18,
            hash_log=6,
            chain_log=6,
            search_log=1,
            min_match=7,
            write_checksum=checksum,
        )
    )


_LIBRARY = {checksum: PerThread(partial(_library, checksum)) for checksum in (False, True)}
