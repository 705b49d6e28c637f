"""A window's vectors of one layer and site as chunks in their stored order, and the sums of what they hold.

One look at each row, which lies far from the processor, serves both. gather.c does the work; where nothing
could be compiled, numpy does: the same bytes and the same sums.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .bf16 import Bits, from_bf16_bits
from .codec import Array, Frames, encode_chunks, encode_planes, planes
from .compiled import COMPILED
from .int8 import Doubles, Floats, Quantised, Scales, dequantise
from .layout import CHUNK

if COMPILED:
    from . import _gather

Places = npt.NDArray[np.int64]

AT_ONCE = 1 << 18
"""Bytes that one call gathers: they lie in the processor's cache until they are encoded."""


def gather_codes(
    of: Quantised, order: Places, group: Places, sums: Doubles
) -> Iterator[tuple[Frames, Scales]]:
    """Codes of some chunks, encoded, and their steps (chunk, token, block), which lie in memory of their own.

    order: place on disk -> row; group (row,): 0 to N_GROUPS - 1; sums (N_GROUPS, d_model): added to.
    """
    width, blocks = of.codes.shape[1], of.scale.shape[1]
    n_chunks = -(-len(order) // CHUNK)
    scale = np.empty((n_chunks * CHUNK, blocks), np.float16)
    codes = np.empty((chunks_at_once(width) * CHUNK, width), np.int8)
    for place, rows in _cut(order, len(codes)):
        some, steps = codes[: place.stop - place.start], scale[place]
        if COMPILED:
            _gather.gather_codes(*of, width, rows, group, some, steps, sums)
        else:
            some[...], steps[...] = (_padded(array[rows]) for array in of)
            _add(dequantise(some, steps), group[rows], sums)
        yield encode_chunks(_by_chunk(some)), _by_chunk(steps)


def gather_bits(bits: Bits, order: Places, group: Places, sums: Doubles) -> Iterator[Frames]:
    """As `gather_codes`, of bf16; what it yields lies in memory that is used again."""
    width = bits.shape[1]
    room = np.empty((2, chunks_at_once(width) * CHUNK, width), np.uint8)
    for place, rows in _cut(order, room.shape[1]):
        low, high = room[:, : place.stop - place.start]
        if COMPILED:
            _gather.gather_planes(bits, width, rows, group, low, high, sums)
        else:
            padded = _padded(bits[rows])
            low.reshape(-1)[:], high.reshape(-1)[:] = planes(padded)
            _add(from_bf16_bits(padded), group[rows], sums)
        yield encode_planes(_by_chunk(low), _by_chunk(high))


def chunks_at_once(width: int) -> int:
    """Several where they are small: a call for each would cost as much as its work."""
    return max(1, AT_ONCE // (CHUNK * width))


def _by_chunk(rows: Array) -> Array:
    return rows.reshape(-1, CHUNK, rows.shape[1])


def _add(values: Floats, group: Places, sums: Doubles) -> None:
    """Of each chunk one vector after the other in float32, and these sums in float64: fast, and exact enough
    for means of stored vectors."""
    with np.errstate(invalid="ignore", over="ignore"):  # bf16 keeps NaN and infinity; the statistics say so
        for start in range(0, len(group), CHUNK):
            of_chunk = np.zeros(sums.shape, np.float32)
            here = group[start : start + CHUNK]
            for vector, which in zip(values[start : start + len(here)], here, strict=True):
                of_chunk[which] += vector
            sums += of_chunk


def _padded(rows: Array) -> Array:
    """Zero rows up to a whole chunk, as Zarr stores it."""
    missing = -len(rows) % CHUNK
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _cut(order: Places, at_once: int) -> Iterator[tuple[slice, Places]]:
    """Places on disk, whole chunks of them, and the rows that go there; a chunk that they do not fill is by
    itself, for its zeros are unlike what others hold."""
    whole = len(order) // CHUNK * CHUNK
    for start in (*range(0, whole, at_once), whole):
        rows = order[start : min(start + at_once, whole) if start < whole else None]
        if len(rows):
            yield slice(start, start + len(rows) + -len(rows) % CHUNK), rows
