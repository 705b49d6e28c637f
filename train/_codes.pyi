"""codes.c; every array is contiguous, float32 or int32 unless said otherwise. What is written comes last."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

def decode(width: int, threads: int, /, *arrays: Array) -> None:
    """starts, columns, values, weight (column, width); out (row, width) += codes times weight.

    Raises ValueError where columns do not ascend in each row.
    """

def tiled(width: int, threads: int, /, *arrays: Array) -> None:
    """rows (row, width); tiles (tile, row, 64)."""

def gradients(width: int, add: bool, threads: int, /, *arrays: Array) -> None:
    """starts, tokens, order of the transpose; values of codes; tiles; weight_grad (latent, width).

    Where given: weight (latent, width), and code_grad (code,) in the order of codes, to which it adds.
    """

def transpose(starts: Array, columns: Array, by_latent: Array, tokens: Array, order: Array, /) -> None:
    """The last three are written."""

def top_k(width: int, k: int, threads: int, /, *arrays: Array) -> None:
    """pre (row, width); columns and values (row, k).

    Where given: starts (row + 1,) and latents, of which pre then has a value each.
    """

def rounded_rows(width: int, threads: int, /, *arrays: Array) -> None:
    """rows (row, width); halves (row, width) of two bytes, norms (2, row)."""

def screen(k: int, sum_error: float, threads: int, /, *arrays: Array) -> None:
    """products (row, width) of two bytes, bias, norms (2, row), (2, width); columns (row, most), counts."""

def has_bfloat16() -> bool:
    """Of the processor."""

def standardise(scale: float, block: int, threads: int, /, *arrays: Array) -> None:
    """int8 codes (row, width), steps (row, width / block), mean (width,); out (row, width)."""
