"""A window that takes no more tokens, as the files that it is on disk."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import layout
from .codec import Frames, Stored, encode_chunk, encode_chunks
from .gathered import Places, gather_bits, gather_codes
from .permutation import permutation
from .shard import shard_parts
from .statistics import SiteSums
from .window import Window

SINK_RATIO = 50.0
"""A token is a sink where its mlp_out norm at some layer is this many times the window's median there."""


class EncodedFile(NamedTuple):
    path: str
    """relative to the cache"""
    parts: Iterable[Stored]
    """Encoded while they are taken; a part's memory is used again for the next."""


class SealedWindow:
    """Window `number` of its split; says which tokens are sinks."""

    def __init__(self, window: Window, split: str, number: int) -> None:
        self.window, self.split, self.number, self.tokens = window, split, number, window.tokens
        sink = _sinks(window)
        window.columns["sink"][: self.tokens] = sink
        kind = window.columns["kind"][: self.tokens]
        self.group: Places = np.asarray(kind + len(layout.KINDS) * sink, np.int64)
        """(token,), in order of arrival"""
        self._order = permutation(self.tokens, window.manifest.seed, number)
        """Place on disk -> place of arrival."""

    def token_files(self) -> Iterator[EncodedFile]:
        for name, column in self.window.columns.items():
            chunk = np.zeros_like(column)
            chunk[: self.tokens] = column[self._order]
            path = layout.window_file(layout.token_array(self.split, name), self.number, 1)
            yield EncodedFile(path, (encode_chunk(chunk),))

    def layer_files(self, site: str, index: int, sums: SiteSums) -> Iterator[EncodedFile]:
        """One layer of one site, permuted, each file to be written before the next is asked for; adds its
        part to `sums`."""
        window = self.window
        self._add_measures(site, index, sums)
        added = np.zeros((layout.N_GROUPS, window.manifest.d_model))
        array = layout.values_array(self.split, site)
        if window.manifest.precision == "bf16":
            bits = window.bits[site][index, : self.tokens]
            yield self._shard(array, index, gather_bits(bits, self._order, self.group, added))
        else:
            stored, scales = window.quantised(site, index, slice(self.tokens)), []

            def codes() -> Iterator[Frames]:
                for frames, some in gather_codes(stored, self._order, self.group, added):
                    scales.append(some)
                    yield frames

            yield self._shard(array, index, codes())
            steps = encode_chunks(np.concatenate(scales))
            yield self._shard(layout.scale_array(self.split, site), index, (steps,))
        sums.sum[:, index] += added

    def _shard(self, array: str, index: int, chunks: Iterable[Frames]) -> EncodedFile:
        parts = shard_parts(chunks, self.window.manifest.chunks_per_window)
        return EncodedFile(layout.shard_file(array, self.number, index), parts)

    @np.errstate(invalid="ignore", over="ignore")  # bf16 keeps NaN and infinity; the statistics then say so
    def _add_measures(self, site: str, index: int, sums: SiteSums) -> None:
        """Sums of the stored (not the true) values: what a trainer will see."""
        noise, square, peak = self.window.measures(site, index, slice(self.tokens))
        for add_at, to, found in (
            (np.add.at, sums.noise, noise),
            (np.add.at, sums.square, square),
            (np.maximum.at, sums.absmax, peak),
        ):
            add_at(to[:, index], self.group, found.astype(np.float64))  # of two dtypes it is 30 times slower


@np.errstate(invalid="ignore")  # a norm that is NaN is no sink
def _sinks(window: Window) -> npt.NDArray[np.bool_]:
    norms = np.sqrt(window.squares("mlp_out"))
    high = norms > SINK_RATIO * np.median(norms, axis=1, keepdims=True)
    return np.asarray(high.any(axis=0))
