"""Stochastic rounding to bfloat16: right on average, so that steps below half an ulp still move a weight."""

from hashlib import blake2b

import torch
from torch import Tensor

LOW_BITS = 16
"""Bits of a float32 that bfloat16 does not have."""


def seeded_generator(device: torch.device, *key: object) -> torch.Generator:
    """Random numbers that follow from `key` alone, so that a resumed run draws the same."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big", signed=True))


def round_into(target: Tensor, values: Tensor, random: torch.Generator) -> None:
    """Put float32 `values` into bfloat16 `target`, up or down with the odds that make the mean exact.

    A random number below one ulp is added to the magnitude, then the low bits go. NaN and infinity stay.
    """
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    noise.random_(0, 1 << LOW_BITS, generator=random)
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << LOW_BITS))
    target.copy_(torch.where(torch.isfinite(values), bits.view(torch.float32), values))
