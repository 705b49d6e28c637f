"""Many small zstd frames, decoded in one call: the scales of a few chunks.

A call for each would cost as much as its frame, and two changes of the thread that Python runs.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from zstandard import ZstdDecompressor, ZstdError

from .per_thread import PerThread

AT_ONCE = 1 << 18
"""Decoded bytes of a call."""

_CHECKSUM = 1 << 2
"""In a frame's descriptor, its fifth byte (RFC 8878, 3.1.1.1.1): a checksum of its content follows it."""
_decompressor = PerThread(ZstdDecompressor)


def decode_frames(frames: list[bytes], out: npt.NDArray[Any], places: list[int]) -> bool:
    """Fill out[place] from the frame of each place; out: (place, ...).

    False where one of them is not sound: `codec.decode_chunk`, which is the reference, says which and why.
    """
    if not all(len(frame) > 4 and frame[4] & _CHECKSUM for frame in frames):
        return False  # it would be decoded without being checked
    size = out[0].nbytes
    step = max(1, AT_ONCE // size)
    for first in range(0, len(frames), step):
        some: list[bytes | bytearray | memoryview] = [*frames[first : first + step]]
        sizes = np.full(len(some), size, np.uint64).data
        try:
            found = _decompressor().multi_decompress_to_buffer(some, decompressed_sizes=sizes)
        except (ZstdError, ValueError):
            return False
        data = b"".join(found[n].tobytes() for n in range(len(found)))
        out[places[first : first + step]] = np.frombuffer(data, out.dtype).reshape(-1, *out.shape[1:])
    return True
