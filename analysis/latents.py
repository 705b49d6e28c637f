"""What the latents of one layer did on the tokens of a cache: how often, how strongly, where most.

Everything is updated from codes, batch by batch, in arrays of (latent, a few); nothing is ever of tokens
times latents. The arrays lie on the device that encodes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from ..train.sparse import Codes
from .examples import Kept, random_scores

BINS = 48
"""Of the histogram of activations, two an octave; what lies outside is in the first or the last one."""
LOWEST = -24
"""Half octaves: the first bin begins at 2^(LOWEST / 2)."""
BYTES_OF_KEPT = 4 + 4 + 8, 8 + 4 + 8
"""Of a top and of a random example: score, value, token."""


class Sizes(NamedTuple):
    """How many examples of each latent are kept."""

    top: int = 16
    random: int = 40
    """A uniform sample of its activations, from which quantiles are taken"""


class LatentStatistics:
    """Of one layer's latents, over the tokens that were added."""

    def __init__(self, n_latents: int, sample: Tensor, kind: Tensor, sizes: Sizes) -> None:
        """sample, kind (token,): of all tokens of the source, on the device."""
        self.n_latents, self._kind = n_latents, kind
        self.by_kind = torch.zeros(n_latents, len(KINDS), dtype=torch.int64, device=kind.device)
        """(latent, kind): tokens for which it was positive"""
        self.histogram = torch.zeros(n_latents, BINS, dtype=torch.int64, device=kind.device)
        """(latent, bin)"""
        self.top = Kept(n_latents, sizes.top, sample)
        self.random = Kept(n_latents, sizes.random, sample, torch.float64)

    def add(self, codes: Codes, token: Tensor) -> None:
        """codes of a batch whose tokens have these numbers (token,), ascending and behind all before."""
        positive = (codes.values > 0).nonzero()[:, 0]  # once: a mask would be turned into places each time
        latent, value, token = (
            part.index_select(0, positive)
            for part in (codes.columns.long(), codes.values.float(), token.index_select(0, codes.tokens))
        )
        self._count(self.by_kind, latent, self._kind[token].long())
        bins = (2 * value.log2()).floor().long() - LOWEST
        self._count(self.histogram, latent, bins.clamp_(0, BINS - 1))
        self.top.offer(latent, value, value, token)
        self.random.offer(latent, random_scores(latent, token), value, token)

    def _count(self, counts: Tensor, latent: Tensor, column: Tensor) -> None:
        n = counts.shape[1]
        counts += torch.bincount(latent * n + column, minlength=counts.numel()).view_as(counts)

    def state(self) -> dict[str, Tensor]:
        kept = {"top": self.top.state(), "random": self.random.state()}
        parts = {f"{name}.{part}": tensor for name, state in kept.items() for part, tensor in state.items()}
        return {"by_kind": self.by_kind, "histogram": self.histogram, **parts}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @staticmethod
    def memory_bytes(n_latents: int, sizes: Sizes) -> int:
        """Of the arrays of one layer."""
        examples = sizes.top * BYTES_OF_KEPT[0] + sizes.random * BYTES_OF_KEPT[1]
        return n_latents * (8 * len(KINDS) + 8 * BINS + examples)


def bin_edges() -> list[float]:
    """BINS + 1 activations between which the bins lie."""
    return [2.0 ** ((LOWEST + place) / 2) for place in range(BINS + 1)]
