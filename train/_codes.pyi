"""codes.c; every array is contiguous, float32 or int32, and the last number is that of threads."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

def decode(
    starts: Array,
    columns: Array,
    values: Array,
    weight: Array,
    out: Array,
    width: int,
    threads: int,
    /,
) -> None:
    """out (row, width) += codes times weight (column, width).

    Raises ValueError where columns do not ascend in each row.
    """

def tiled(rows: Array, tiles: Array, width: int, threads: int, /) -> None:
    """rows (row, width), to tiles (tile, row, 64)."""

def gradients(
    starts: Array,
    tokens: Array,
    order: Array,
    values: Array,
    tiles: Array,
    weight_grad: Array,
    width: int,
    add: bool,
    threads: int,
    weight: Array = ...,
    code_grad: Array = ...,
    /,
) -> None:
    """weight_grad (latent, width), written or added; code_grad (code,), added.

    starts, tokens, order: the transpose; values, code_grad: in the order of codes.
    """

def transpose(starts: Array, columns: Array, by_latent: Array, tokens: Array, order: Array, /) -> None:
    """The last three are written."""

def top_k(pre: Array, columns: Array, values: Array, width: int, k: int, threads: int, /) -> None:
    """columns and values (row, k), from pre (row, width)."""

def standardise(
    codes: Array, steps: Array, mean: Array, out: Array, scale: float, block: int, threads: int, /
) -> None:
    """out (row, width), from int8 codes, with steps (row, block)."""
