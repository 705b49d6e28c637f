"""In which order a cache is read: (seed, epoch, buffer) -> chunks -> tokens. Pure integers, no state.

An epoch's chunks are permuted by a keyed bijection and cut into buffers of nearly equal size; the chosen
tokens of a buffer are permuted. Every token comes once an epoch, and nothing has to be remembered.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cache_format.layout import CHUNK
from ..cache_format.permutation import Bijection, permutation
from .config import ORDERS
from .window_groups import WindowGroups

Ints = npt.NDArray[np.int64]

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
    groups: WindowGroups | None = None
    """Where only some windows are in use at a time."""

    def __post_init__(self) -> None:
        if self.name not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, found {self.name!r}")

    @property
    def n_buffers(self) -> int:
        """Buffers of an epoch."""
        return -(-self.n_chunks // max(1, self.buffer_tokens // CHUNK))

    @property
    def largest_buffer(self) -> int:
        """Chunks of the largest buffer."""
        return -(-self.n_chunks // self.n_buffers)

    def chunks(self, epoch: int, buffer: int) -> Ints:
        """Chunk numbers in one buffer of one epoch."""
        first, end = (i * self.n_chunks // self.n_buffers for i in (buffer, buffer + 1))
        places = np.arange(first, end)
        if self.groups is not None:
            return self.groups.chunks(epoch, places)
        return places if self.name == "sequential" else Bijection(self.n_chunks, self.seed, epoch)(places)

    def windows_in_use(self, epoch: int, buffer: int) -> tuple[Ints, Ints]:
        """The windows of the buffer's groups, and those that are in use next; none without groups."""
        if self.groups is None:
            return np.arange(0), np.arange(0)
        first, end = (i * self.n_chunks // self.n_buffers for i in (buffer, buffer + 1))
        return self.groups.in_use(epoch, first, end)

    def shuffled(self, n_tokens: int, epoch: int, buffer: int) -> Ints:
        """Order in which the n_tokens chosen tokens of a buffer are delivered."""
        if self.name == "sequential":
            return np.arange(n_tokens)
        return permutation(n_tokens, self.seed, epoch, buffer, _TOKENS_KEY)


def predicted_partners(
    batch: int,
    tokens_per_sample: float,
    n_tokens: int,
    window: int,
    buffer: int,
    stored: int | None = None,
    shuffle_windows: int | None = None,
) -> float:
    """m: tokens of its own sample that a token is expected to meet in its batch.

    batch, tokens_per_sample, n_tokens: of the tokens that count. window, buffer: of those that are stored,
    `stored` in all (None: all count). shuffle_windows: of a group; m is that of a cache as long as a group.

    A sample's tokens lie in one window of W, or in two. Another one of them is in the same chunk of c with
    probability (c-1)/(W-1), in another chunk of the same buffer of R with (R-c)/(N-c). Of the R-1 others of
    a buffer those that are in the same batch are counted, and so are the batch's tokens from other buffers.
    """
    stored = stored or n_tokens
    share = n_tokens / stored
    if shuffle_windows is not None and shuffle_windows * window < stored:
        n_groups = -(-stored // (shuffle_windows * window))
        stored, n_tokens = round(stored / n_groups), round(n_tokens / n_groups)
    n_buffers = ReadOrder(-(-stored // CHUNK), buffer, seed=0).n_buffers
    width, chunk, size = min(window, stored) * share, min(CHUNK, stored) * share, n_tokens / n_buffers
    same_chunk = _in_one_window(tokens_per_sample / width) * max(0.0, chunk - 1) / max(1.0, width - 1)
    same_buffer = same_chunk + (1 - same_chunk) * (size - chunk) / max(1.0, n_tokens - chunk)
    batch = min(batch, n_tokens)
    own = _of_own_buffer(batch, n_tokens, size)
    met = same_buffer * (own - 1) / max(1.0, size - 1)
    if n_buffers > 1:
        met += (1 - same_buffer) * (batch - own) / (n_tokens - size)
    return (tokens_per_sample - 1) * met


def perfect_partners(batch: int, tokens_per_sample: float, n_tokens: int) -> float:
    """m of a perfect shuffle: every token is as likely as any other to be in the batch."""
    return (tokens_per_sample - 1) * (min(batch, n_tokens) - 1) / max(1, n_tokens - 1)


def _in_one_window(length: float) -> float:
    """Chance that no window ends between two tokens of a sample of `length` windows: the mean of 1 - lag."""
    return 1 - length / 3 if length < 1 else (1 - 1 / (3 * length)) / length


def _of_own_buffer(batch: int, n_tokens: int, size: float) -> float:
    """Mean number of a batch's tokens, itself included, that come from a token's own buffer of `size`."""
    whole = n_tokens // batch * batch
    ends = np.concatenate([np.arange(0, whole + 1, batch), np.arange(size, whole, size)])
    return float(np.square(np.diff(np.sort(ends))).sum() / whole)


def measured_partners(samples: npt.NDArray[np.int32]) -> float:
    """m of one batch, from the sample number of each of its tokens."""
    _, counts = np.unique(samples, return_counts=True)
    return float((counts * (counts - 1)).sum() / len(samples))
