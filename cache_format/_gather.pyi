"""gather.c; every array is contiguous, order (token,) and group (row,) int64, sums (8, width) float64."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

def gather_codes(
    codes: Array,
    scale: Array,
    width: int,
    order: Array,
    group: Array,
    chunk_codes: Array,
    chunk_scale: Array,
    sums: Array,
    /,
) -> None:
    """The rows `order` of int8 codes and float16 steps into as many chunks as they fill, zeros behind them.

    Their values are added to the sums of their groups in this order. ValueError where one is out of range.
    """

def gather_planes(
    bits: Array, width: int, order: Array, group: Array, low: Array, high: Array, sums: Array, /
) -> None:
    """As `gather_codes`, of bf16 bits; low and high bytes apart."""
