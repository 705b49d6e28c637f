"""A window's vectors of one layer and site as chunks in their stored order, and the sums of what they hold.

One look at each row, which lies far from the processor, serves both. gather.c does the work; where nothing
could be compiled, numpy does: the same bytes and the same sums.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .bf16 import Bits, from_bf16_bits
from .codec import Array, Parts, encode_chunk, encode_planes, planes
from .compiled import COMPILED
from .int8 import Doubles, Floats, Quantised, dequantise
from .layout import CHUNK

if COMPILED:
    from . import _gather

Places = npt.NDArray[np.int64]


def gather_codes(of: Quantised, order: Places, group: Places, sums: Doubles) -> Iterator[tuple[Parts, Parts]]:
    """Stored bytes of codes and steps, chunk by chunk.

    order: place on disk -> row; group (row,): 0 to N_GROUPS - 1; sums (N_GROUPS, d_model): added to.
    """
    width, blocks = of.codes.shape[1], of.scale.shape[1]
    codes, scale = np.empty((CHUNK, width), np.int8), np.empty((CHUNK, blocks), np.float16)
    for rows in _cut(order):
        if COMPILED:
            _gather.gather_codes(*of, width, rows, group, codes, scale, sums)
        else:
            codes, scale = (_padded(array[rows]) for array in of)
            _add(dequantise(codes, scale), group[rows], sums)
        yield (encode_chunk(codes),), (encode_chunk(scale),)


def gather_bits(bits: Bits, order: Places, group: Places, sums: Doubles) -> Iterator[Parts]:
    """As `gather_codes`, of bf16; what it yields lies in memory that all its chunks together have."""
    width = bits.shape[1]
    low, high = (
        np.empty((-(-len(order) // CHUNK), CHUNK * width), np.uint8),
        np.empty(CHUNK * width, np.uint8),
    )
    for chunk, rows in enumerate(_cut(order)):
        if COMPILED:
            _gather.gather_planes(bits, width, rows, group, low[chunk], high, sums)
        else:
            padded = _padded(bits[rows])
            low[chunk], high = planes(padded)
            _add(from_bf16_bits(padded), group[rows], sums)
        yield encode_planes(low[chunk], high)


def _add(values: Floats, group: Places, sums: Doubles) -> None:
    """One vector after the other, in float64: a sink's massive channels swallow no digits of the others."""
    with np.errstate(invalid="ignore"):  # bf16 keeps NaN and infinity; the statistics then say so
        for vector, which in zip(values, group, strict=False):  # behind the last one lies padding
            sums[which] += vector


def _padded(rows: Array) -> Array:
    """Zero rows up to a whole chunk, as Zarr stores it."""
    missing = -len(rows) % CHUNK
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _cut(order: Places) -> Iterator[Places]:
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]
