"""float32 vectors as the bits of bfloat16, and back; quantise.c does the work where it could be compiled."""

import numpy as np
import numpy.typing as npt

from .compiled import COMPILED
from .int8 import SLAB, Doubles, Floats

if COMPILED:
    from . import _quantise

Bits = npt.NDArray[np.uint16]


def to_bf16_bits(values: Floats) -> Bits:
    """Bits of the nearest bfloat16 (ties to even); a NaN stays a NaN with its upper payload."""
    rounded = np.empty(values.shape, np.uint16)
    if COMPILED and values.size:
        _quantise.round_to_bf16(np.ascontiguousarray(values), values.shape[-1], rounded)
    else:
        _round(np.ascontiguousarray(values), rounded)
    return rounded


def store_bits(place: Bits, values: Floats | Bits, square: Doubles, peak: Floats) -> None:
    """Put bits, or `values` as bits, into `place` (token, d_model), contiguous.

    square, peak: filled with the squared norm and the largest size of each vector, (token,).
    """
    if COMPILED:
        _quantise.round_to_bf16(np.ascontiguousarray(values), values.shape[1], place, square, peak)
        return
    if values.dtype == np.uint16:
        place[...] = values
    else:
        _round(np.ascontiguousarray(values), place)
    for token, bits in enumerate(place):
        # in float64: one channel may swallow the digits of the others, or overflow; a NaN is larger than all
        square[token] = np.square(from_bf16_bits(bits), dtype=np.float64).sum()
        peak[token] = from_bf16_bits((bits & np.uint16(0x7FFF)).max(keepdims=True))[0]


def from_bf16_bits(bits: Bits) -> Floats:
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _round(values: Floats, out: Bits) -> None:
    flat, places = values.reshape(-1).view(np.uint32), out.reshape(-1)
    for start in range(0, flat.size, SLAB):
        bits, place = flat[start : start + SLAB], places[start : start + SLAB]
        kept = bits >> np.uint32(16)
        place[...] = (bits + np.uint32(0x7FFF) + (kept & np.uint32(1))) >> np.uint32(16)
        nan = np.flatnonzero((bits & np.uint32(0x7FFFFFFF)) > 0x7F800000)
        place[nan] = np.where(kept[nan] & np.uint32(0x7F), kept[nan], kept[nan] | np.uint32(0x40))
