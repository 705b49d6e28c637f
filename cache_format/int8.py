"""float32 vectors as int8 codes and float16 steps, and back.

One step a token, 1.2533 * mean |value| / divisor: rms / divisor for a Gaussian, but a few massive
channels do not coarsen the rest. A block of 32 channels (in older caches 64) whose largest value does not
fit into 127 such steps gets a step of its own, absmax / 127, so that nothing is ever clipped. (One step for
all channels costs fewer bits at equal noise than a step that follows each block.)

quantise.c does the work; `_by_numpy` says what it is, and does it where nothing could be compiled.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .compiled import COMPILED
from .errors import CacheError
from .layout import BLOCK, block_of, n_blocks

if COMPILED:
    from . import _quantise

Int8s = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Scales = npt.NDArray[np.float16]

GAUSSIAN = math.sqrt(math.pi / 2)
"""Root mean square of a Gaussian over its mean absolute value."""

SLAB = 1 << 18
"""Values that numpy looks at at a time: the temporaries still fit into the processor's cache."""

UNSTORABLE = (
    "an activation is not finite, or beyond 8.3e6, which int8 blocks cannot hold; "
    "look at the sample, or harvest with --precision bf16"
)

_LARGEST_STEP = np.float32(np.finfo(np.float16).max)


class Quantised(NamedTuple):
    codes: Int8s
    """(token, d_model), -127 to 127"""
    scale: Scales
    """(token, block): the step of each block"""


class Measures(NamedTuple):
    """Of each vector, (token,)."""

    noise: Floats
    """Squared distance of the stored from the true vector."""
    square: Doubles
    """Squared norm, as stored."""
    peak: Floats
    """Largest size of a value, as stored."""

    def rows(self, tokens: slice) -> "Measures":
        return Measures(self.noise[tokens], self.square[tokens], self.peak[tokens])


def quantise(values: Floats, divisor: float, block: int = BLOCK) -> Quantised:
    """int8 codes and float16 steps of `values` (token, d_model); |code * step - value| <= step / 2.

    Raises CacheError where a value is not finite, or so large that its step overflows float16.
    """
    tokens, width = values.shape
    scale = np.empty((tokens, n_blocks(width, block)), np.float16)
    made = Quantised(np.empty((tokens, width), np.int8), scale)
    quantise_into(made, values, divisor)
    return made


def quantise_into(
    place: Quantised,
    values: Floats,
    divisor: float,
    measures: Measures | None = None,
    rows: npt.NDArray[np.int64] | None = None,
    threads: int = 1,
) -> None:
    """As `quantise`, into contiguous arrays, whose shapes tell the block.

    measures: filled, equal to numpy's but for last digits.
    rows: which of `values` the tokens are, in order; with `measures` only.
    threads: of the OpenMP runtime that the caller's process has loaded, for callers that work with it.
    """
    assert rows is None or measures
    if COMPILED:
        given, factor = np.ascontiguousarray(values), GAUSSIAN / divisor
        told = (*(measures or ()), *(() if rows is None else (rows,)))
        if _quantise.quantise(given, values.shape[1], factor, threads, *place, *told) >= 0:
            raise CacheError(UNSTORABLE)
        return
    for part in slabs(*place.codes.shape):
        some = Quantised(place.codes[part], place.scale[part])
        _by_numpy(
            some, values[part if rows is None else rows[part]], divisor, measures and measures.rows(part)
        )


def _by_numpy(place: Quantised, values: Floats, divisor: float, measures: Measures | None) -> None:
    (tokens, width), blocks = values.shape, place.scale.shape[1]
    padded = np.zeros((tokens, blocks, block_of(width, blocks)), np.float32)
    padded.reshape(tokens, -1)[:, :width] = values
    size = np.abs(padded)
    peak = size.max(axis=2)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the scale
        mean = size.reshape(tokens, -1)[:, :width].mean(axis=1, keepdims=True)
        wanted = np.minimum(mean * np.float32(GAUSSIAN / divisor), _LARGEST_STEP)
        step = np.maximum(wanted, peak / np.float32(127))
    place.scale[...], stored = round_up_to_half(step)
    check_scale(stored)
    inverse = np.divide(1, stored, out=np.zeros_like(step), where=stored > 0)
    exact = np.multiply(padded, inverse[:, :, None], out=padded)
    rounded = np.rint(exact, out=size)
    place.codes[...] = rounded.reshape(tokens, -1)[:, :width]
    if measures:
        area = np.square(stored, dtype=np.float64)
        measures.peak[...] = (np.rint(peak * inverse) * stored).max(axis=1)
        measures.square[...] = (np.square(rounded).sum(axis=2) * area).sum(axis=1)
        measures.noise[...] = (np.square(rounded - exact).sum(axis=2) * area).sum(axis=1)


def check_scale(scale: Scales | Floats) -> None:
    """CacheError where a vector was not finite, or so large that its step overflows float16."""
    if not np.isfinite(scale).all():
        raise CacheError(UNSTORABLE)


def dequantise(codes: Int8s, scale: Scales) -> Floats:
    """float32 values of `codes` (token, d_model) with `scale` (token, block)."""
    values = codes.astype(np.float32)
    _multiply_blocks(values, scale.astype(np.float32))
    return values


def _multiply_blocks(values: Floats, per_block: Floats) -> None:
    """In place: values (token, d_model) times the factor of their block."""
    tokens, width = values.shape
    block = block_of(width, per_block.shape[1])
    whole = width // block
    cut, shape = whole * block, (tokens, whole, block)
    values[:, :cut].reshape(shape)[...] *= per_block[:, :whole, None]
    if cut < width:
        values[:, cut:] *= per_block[:, whole:]


def slabs(tokens: int, width: int) -> Iterator[slice]:
    """The tokens in portions of about SLAB values."""
    at_once = max(1, SLAB // width)
    for start in range(0, tokens, at_once):
        yield slice(start, min(tokens, start + at_once))


def round_up_to_half(step: Floats) -> tuple[Scales, Floats]:
    """The smallest float16 that is not below `step` >= 0, and its value; inf where there is none.

    The next float16 is the next integer of its bits; numpy's own arithmetic on float16 is slow.
    """
    with np.errstate(over="ignore"):
        half = step.astype(np.float16)
    half.view(np.uint16)[...] += half.astype(np.float32) < step
    return half, half.astype(np.float32)
