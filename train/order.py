"""In which order a cache is read: (seed, epoch, buffer) -> chunks -> tokens. Pure integers, no state.

An epoch's chunks are permuted by a keyed bijection and cut into buffers of nearly equal size; the chosen
tokens of a buffer are permuted. Every token comes once an epoch, and nothing has to be remembered.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cache_format.layout import CHUNK
from ..cache_format.permutation import Bijection, permutation

Ints = npt.NDArray[np.int64]

ORDERS = ("shuffled", "sequential")

_TOKENS_KEY = 1
"""Keeps the permutation of a buffer's tokens apart from that of the epoch's chunks."""


@dataclass(frozen=True)
class ReadOrder:
    n_chunks: int
    """Of all caches together."""
    buffer_tokens: int
    """At most; a buffer is whole chunks."""
    seed: int
    name: str = "shuffled"
    """Or "sequential", the order on disk, for comparison."""

    def __post_init__(self) -> None:
        if self.name not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, found {self.name!r}")

    @property
    def n_buffers(self) -> int:
        """Buffers of an epoch."""
        return -(-self.n_chunks // max(1, self.buffer_tokens // CHUNK))

    def chunks(self, epoch: int, buffer: int) -> Ints:
        """Chunk numbers in one buffer of one epoch."""
        first, end = (i * self.n_chunks // self.n_buffers for i in (buffer, buffer + 1))
        places = np.arange(first, end)
        return places if self.name == "sequential" else Bijection(self.n_chunks, self.seed, epoch)(places)

    def shuffled(self, n_tokens: int, epoch: int, buffer: int) -> Ints:
        """Order in which the n_tokens chosen tokens of a buffer are delivered."""
        if self.name == "sequential":
            return np.arange(n_tokens)
        return permutation(n_tokens, self.seed, epoch, buffer, _TOKENS_KEY)


def predicted_partners(
    batch: int, tokens_per_sample: float, n_tokens: int, window: int, buffer: int
) -> float:
    """m: tokens of its own sample that a token is expected to meet in its batch.

    A sample's tokens lie in one window of W. Another one of them is in the same chunk of c with probability
    (c-1)/(W-1), in another chunk of the same buffer of R with (R-c)/(N-c), and those in one buffer share
    a batch of B with (B-1)/(R-1). A perfect shuffle has (B-1)(T-1)/N.
    """
    window, buffer = min(window, n_tokens), min(buffer, n_tokens)
    batch, chunk = min(batch, buffer), min(CHUNK, n_tokens)
    same_chunk = (chunk - 1) / max(1, window - 1)
    same_buffer = same_chunk + (1 - same_chunk) * (buffer - chunk) / max(1, n_tokens - chunk)
    return (tokens_per_sample - 1) * same_buffer * (batch - 1) / max(1, buffer - 1)


def measured_partners(samples: npt.NDArray[np.int32]) -> float:
    """m of one batch, from the sample number of each of its tokens."""
    _, counts = np.unique(samples, return_counts=True)
    return float((counts * (counts - 1)).sum() / len(samples))
