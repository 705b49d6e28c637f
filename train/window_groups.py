"""An order in which only some windows are in use at a time, for caches of which only a part is at hand.

An epoch's windows are permuted and dealt into groups of nearly equal number; the chunks of a group are
permuted, and group follows group. So a cache that is fetched piece by piece has to hold two groups: the one
in use, and the one that is fetched meanwhile. The price is that a token meets more of its own sample:
`order.predicted_partners` of a cache that is as long as a group.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cache_format.permutation import Bijection, permutation

Ints = npt.NDArray[np.int64]

_WINDOWS_KEY = 2
"""Keeps the permutation of windows apart from those of chunks and tokens."""


@dataclass(frozen=True)
class WindowGroups:
    chunks_of: tuple[int, ...]
    """Chunks of each window, of all caches one after another."""
    size: int
    """Windows of a group, at most."""
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"--shuffle-windows: expected at least 1, found {self.size}")

    @property
    def n_groups(self) -> int:
        return -(-len(self.chunks_of) // self.size)

    def windows(self, epoch: int, group: int) -> Ints:
        """Windows of one group, in no order that counts."""
        n = len(self.chunks_of)
        first, end = (i * n // self.n_groups for i in (group, group + 1))
        return permutation(n, self.seed, epoch, _WINDOWS_KEY)[first:end]

    def chunks(self, epoch: int, places: Ints) -> Ints:
        """Chunk numbers at places 0, 1, ... of an epoch."""
        sizes = np.array(self.chunks_of, np.int64)
        begins = np.cumsum(sizes) - sizes
        ends = self._ends(epoch)
        out = np.empty(len(places), np.int64)
        for group in range(self.n_groups):
            first = ends[group - 1] if group else 0
            mine = np.flatnonzero((places >= first) & (places < ends[group]))
            if len(mine):
                windows = self.windows(epoch, group)
                inside = Bijection(int(ends[group] - first), self.seed, epoch, group)(places[mine] - first)
                own_ends = np.cumsum(sizes[windows])
                nth = np.searchsorted(own_ends, inside, side="right")
                out[mine] = begins[windows[nth]] + inside - (own_ends[nth] - sizes[windows[nth]])
        return out

    def in_use(self, epoch: int, first: int, end: int) -> tuple[Ints, Ints]:
        """Windows of the groups that places first..end-1 lie in; those of the group that follows, if they
        lie in one."""
        ends = self._ends(epoch)
        low, high = (int(np.searchsorted(ends, place, side="right")) for place in (first, end - 1))
        now = np.concatenate([self.windows(epoch, group) for group in range(low, high + 1)])
        if low != high or self.n_groups == 1:
            return now, now[:0]
        if low + 1 < self.n_groups:
            return now, self.windows(epoch, low + 1)
        return now, self.windows(epoch + 1, 0)

    def _ends(self, epoch: int) -> Ints:
        """Place behind each group's last chunk."""
        sizes = np.array(self.chunks_of, np.int64)
        counts = [sizes[self.windows(epoch, group)].sum() for group in range(self.n_groups)]
        return np.cumsum(counts).astype(np.int64)
