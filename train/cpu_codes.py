"""The products of codes on a CPU, in compiled loops (codes.c); torch does them where there was no compiler.

Each sum has one order: results do not depend on the number of threads, which is torch's.
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

COMPILED = find_spec(f"{__package__}._codes") is not None
ADVICE = (
    "the compiled loops of the step are missing, torch does their work, more slowly; "
    "install a C compiler and Python's headers, then this package again"
)
TILE = 64
"""Channels that are looked at together"""


class Tiles(NamedTuple):
    """Rows of tokens, cut into tiles of channels, for `gradients`."""

    values: Tensor
    """(tile, token, TILE), zeros behind the last channel"""
    width: int


def is_compiled(tensor: Tensor) -> bool:
    """Whether compiled loops do the products of rows like these: float32, on a CPU."""
    return COMPILED and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def decode(codes: tuple[Tensor, Tensor, Tensor], weight: Tensor, out: Tensor) -> None:
    """out (token, d) += codes (starts, columns, values) times weight (latent, d)."""
    from ._codes import decode

    decode(out.shape[1], torch.get_num_threads(), *map(_array, (*codes, weight, out)))


def tiled(rows: Tensor) -> Tiles:
    """The same numbers, tile after tile: rows (token, d)."""
    from ._codes import tiled

    n_rows, width = rows.shape
    tiles = rows.new_empty(-(-width // TILE), n_rows, TILE)
    tiled(width, torch.get_num_threads(), _array(rows.contiguous()), _array(tiles))
    return Tiles(tiles, width)


def gradients(
    by_latent: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    rows: Tiles,
    weight_grad: Tensor,
    *,
    add: bool,
    weight: Tensor | None = None,
    code_grad: Tensor | None = None,
) -> None:
    """Weight gradient A^T @ rows (latent, d), written or added; with `weight` (latent, d), in the same pass,
    `code_grad` (code,), added.

    by_latent: the transpose's starts and tokens, and the place of each of its entries among the codes.
    """
    from ._codes import gradients

    also = [tensor for tensor in (weight, code_grad) if tensor is not None]
    arrays = map(_array, (*by_latent, values, rows.values, weight_grad, *also))
    gradients(rows.width, add, torch.get_num_threads(), *arrays)


def transpose(starts: Tensor, columns: Tensor, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes by latent: row starts and tokens of the transpose, and where each of its entries was; int32."""
    from ._codes import transpose

    found = starts.new_empty(n_latents + 1), torch.empty_like(columns), torch.empty_like(columns)
    transpose(_array(starts), _array(columns), *map(_array, found))
    return found


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and int32 latents (token, k) of the k largest of relu(pre) (token, latent), latents ascending.

    Of equal ones those of the lower latents; a NaN is above all.
    """
    from ._codes import top_k

    rows, width = pre.shape
    columns, values = torch.empty(rows, k, dtype=torch.int32), pre.new_empty(rows, k)
    top_k(width, k, torch.get_num_threads(), *map(_array, (pre.contiguous(), columns, values)))
    return values, columns


def top_k_of(codes: tuple[Tensor, Tensor, Tensor], n_latents: int, k: int) -> tuple[Tensor, Tensor]:
    """As `top_k`, of pre-activations (starts, latents, values) of all latents that may be among the k."""
    from ._codes import top_k

    starts, latents, pre = codes
    columns, values = latents.new_empty(len(starts) - 1, k), pre.new_empty(len(starts) - 1, k)
    top_k(n_latents, k, torch.get_num_threads(), *map(_array, (pre, columns, values, starts, latents)))
    return values, columns


def products(codes: tuple[Tensor, Tensor], rows: Tiles, weight: Tensor, out: Tensor) -> None:
    """out (code,) += each code's latent's row of weight (latent, d) times its token's row."""
    from ._codes import gradients

    by_latent, nothing = transpose(*codes, len(weight)), weight.new_empty(0)
    arrays = map(_array, (*by_latent, out, rows.values, nothing, weight, out))
    gradients(rows.width, False, torch.get_num_threads(), *arrays)


@cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 numbers."""
    from ._codes import has_bfloat16

    return has_bfloat16()


def round_rows(rows: Tensor, halves: Tensor, norms: Tensor) -> None:
    """Of rows (row, d): halves (row, d) bfloat16; norms (2, row), as `screen` takes them."""
    from ._codes import rounded_rows

    arrays = map(_array, (rows, halves.view(torch.int16), norms))
    rounded_rows(rows.shape[1], torch.get_num_threads(), *arrays)


def screen(
    products: Tensor,
    bias: Tensor,
    row_norms: Tensor,
    weight_norms: Tensor,
    k: int,
    most: int,
    sum_error: float,
) -> tuple[Tensor, Tensor]:
    """Latents (token, most) that may be among the k largest of relu(x w + bias); how many: -1 above most.

    products (token, latent): x w, of rounded numbers and rounded; norms: (2, token) and (2, latent).
    """
    from ._codes import screen

    columns = torch.empty(len(products), most, dtype=torch.int32)
    counts = torch.empty(len(products), dtype=torch.int32)
    arrays = map(_array, (products.view(torch.int16), bias, row_norms, weight_norms, columns, counts))
    screen(k, sum_error, torch.get_num_threads(), *arrays)
    return columns, counts


def standardise(codes: Tensor, steps: Tensor, mean: Tensor, scale: float, block: int) -> Tensor:
    """(codes * steps - mean) / scale: int8 (token, d) in blocks with a step each (token, d / block)."""
    from ._codes import standardise

    out = mean.new_empty(codes.shape)
    arrays = map(_array, (codes.contiguous(), steps.float().contiguous(), mean.contiguous(), out))
    standardise(scale, block, torch.get_num_threads(), *arrays)
    return out


def _array(tensor: Tensor) -> npt.NDArray[np.generic]:
    assert tensor.is_contiguous(), tensor.stride()
    array: npt.NDArray[np.generic] = tensor.detach().numpy()
    return array
