"""quantise.c; every array is contiguous."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

def quantise(
    values: Array,
    width: int,
    factor: float,
    threads: int,
    codes: Array,
    scale: Array,
    noise: Array = ...,
    square: Array = ...,
    peak: Array = ...,
    rows: Array = ...,
    /,
) -> int:
    """int8 codes and float16 steps of `values` (row, width) float32; factor: step over mean |value|.

    threads: of the OpenMP runtime that is loaded; without one the calling thread does it alone.

    rows (token,) int64: which of `values` are the tokens; not given: all of them.

    noise float32, square float64, peak float32, (token,) each: filled as `Measures` says, all or none.
    Returns a token that int8 cannot hold, or -1; what stands behind it may not be quantised.
    """

def round_to_bf16(values: Array, width: int, bits: Array, square: Array = ..., peak: Array = ..., /) -> None:
    """bf16 bits of `values` (token, width), float32 or such bits; square float64 and peak float32."""
