"""The products of codes on a CUDA device, as Triton kernels. Imported only where codes lie on one.

Rows may be bfloat16; sums are float32. Each program owns what it writes: there are no atomics, so results
do not depend on timing. A program handles one token or latent and one tile of d_model; the index that runs
fastest is the token or latent, so that at any time all programs read one slab (row, tile), from L2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Channels of one program: 4 warps read a bfloat16 row 8 bytes a thread."""


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    starts, columns, values, rows, out, width, ADD: tl.constexpr, TILE: tl.constexpr
):
    """out[i] (+)= sum over the codes j of i of values[j] * rows[columns[j]]."""
    i = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = channels < width
    total = tl.zeros([TILE], tl.float32)
    for j in range(tl.load(starts + i), tl.load(starts + i + 1)):
        row = tl.load(columns + j).to(tl.int64)
        read = tl.load(rows + row * width + channels, mask=inside, other=0.0)
        total += tl.load(values + j).to(tl.float32) * read.to(tl.float32)
    if ADD:
        total += tl.load(out + i * width + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i * width + channels, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _both_gradients(  # type: ignore[no-untyped-def]
    starts,
    tokens,
    order,
    values,
    grad,
    weight,
    weight_grad,
    parts,
    width,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of one latent and tile, each gradient row read once: for the weight's row, and for the latent's codes.

    parts[order[j], tile] = <weight[i], grad[tokens[j]]> over the tile, for the codes j of latent i.
    """
    i, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tile * TILE + tl.arange(0, TILE)
    inside = channels < width
    own = tl.load(weight + i * width + channels, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for j in range(tl.load(starts + i), tl.load(starts + i + 1)):
        row = tl.load(tokens + j).to(tl.int64)
        read = tl.load(grad + row * width + channels, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(values + j).to(tl.float32) * read
        place = tl.load(order + j).to(tl.int64) * tl.num_programs(1) + tile
        tl.store(parts + place, tl.sum(own * read, axis=0))
    if ADD:
        total += tl.load(weight_grad + i * width + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(weight_grad + i * width + channels, total.to(weight_grad.dtype.element_ty), mask=inside)


def sum_rows(
    starts: Tensor, columns: Tensor, values: Tensor, rows: Tensor, out: Tensor, *, add: bool
) -> None:
    """The matrix (starts, columns, values) in CSR form times rows (column, d), written or added to out."""
    width = rows.shape[1]
    _require_rows(rows, out)
    _launch(_sum_rows, len(out), width, starts, columns, values, rows, out, width, ADD=add)


def both_gradients(
    by_latent: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    grad: Tensor,
    weight: Tensor,
    weight_grad: Tensor,
    code_grad: Tensor,
    *,
    add: bool,
) -> None:
    """Weight gradient A^T @ grad (latent, d), written or added; code gradient (code,), added; one pass.

    by_latent: the transpose's starts and tokens, and the place of each of its entries among the codes; values
    in the transpose's order.
    """
    starts, tokens, order = by_latent
    width = grad.shape[1]
    _require_rows(grad, weight, weight_grad)
    parts = torch.empty(len(code_grad), -(-width // TILE), dtype=torch.float32, device=grad.device)
    arguments = (starts, tokens, order, values, grad, weight, weight_grad, parts, width)
    _launch(_both_gradients, len(weight), width, *arguments, ADD=add)
    code_grad += parts.sum(dim=1)


def _launch(kernel: Any, rows: int, width: int, *arguments: Any, ADD: bool) -> None:
    if rows:
        kernel[(rows, -(-width // TILE))](*arguments, ADD=ADD, TILE=TILE, num_warps=4)


def _require_rows(*matrices: Tensor) -> None:
    for matrix in matrices:
        assert matrix.stride(1) == 1, matrix.stride()
        assert matrix.stride(0) == matrix.shape[1], matrix.stride()
