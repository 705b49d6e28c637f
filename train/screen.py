"""Top-k of relu(x W^T + b) on a CPU with half of the matrix product's time, and nothing lost.

x W^T is formed in bfloat16, which some processors multiply twice as fast as float32. What rounding can have
changed is bounded for each token and latent (codes_screen.h); latents that cannot be among the k largest go,
and the few that can get their float32 value. The codes are those of the float32 product, to the rounding of
its sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_codes
from .memory import SCREENED
from .sparse import Codes

SUM_ERROR = 2.0**-23
"""For each channel, what float32 sums may lose of the product of the norms."""
FEW = 16
"""Screening is given up where it leaves more than one of so many latents."""


class Rounded(NamedTuple):
    halves: Tensor
    """(row, d) bfloat16"""
    norms: Tensor
    """(2, row): at least the norm of each row, and of what rounding took from it"""


def is_worth_it(weight: Tensor) -> bool:
    """Whether this processor is faster so."""
    return cpu_codes.is_compiled(weight) and weight.numel() >= SCREENED and cpu_codes.has_bfloat16()


def rounded(rows: Tensor) -> Rounded:
    """Of rows (row, d) float32."""
    found = Rounded(torch.empty_like(rows, dtype=torch.bfloat16), rows.new_empty(2, len(rows)))
    cpu_codes.round_rows(rows, *found)
    return found


def top_k(inputs: Tensor, weight: Tensor, small: Rounded, bias: Tensor, k: int) -> Codes | None:
    """Codes of inputs (token, d), weight (latent, d); small: it, rounded. None: too many latents are near."""
    halves, norms = rounded(inputs)
    products = halves @ small.halves.T
    del halves
    most = max(2 * k, len(weight) // FEW)
    columns, counts = cpu_codes.screen(
        products, bias, norms, small.norms, k, most, SUM_ERROR * inputs.shape[1]
    )
    del products
    if int(counts.min()) < 0:
        return None
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    near = columns[torch.arange(most, dtype=torch.int32) < counts[:, None]]
    values = bias[near]
    cpu_codes.products((starts, near), cpu_codes.tiled(inputs), weight, values)
    return Codes.rectangle(*cpu_codes.top_k_of((starts, near, values), len(weight), k), len(weight))
