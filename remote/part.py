"""A part of a cache, some layers or its first windows, as the cache that a harvest of that part writes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..cache_format import Cache, Manifest, layout
from ..cache_format.codec import decode_chunk, encode_chunk
from ..cache_format.files import checksum
from ..cache_format.journal import FileEntry, Journal, WindowEntry


class Piece(NamedTuple):
    """One file of a window: where it lies in the whole cache, and where in the part."""

    origin: str
    entry: FileEntry
    name: str
    shape: tuple[int, ...] | None
    """Of a statistic of which only some layers stay; None: the bytes stay as they are"""


@dataclass(frozen=True)
class Part:
    """layers: numbers of the model; windows: the first so many of each split, None: all.

    It is what `clt harvest` would have written for those layers up to that window, so it is a cache like
    any other, of an identity of its own. Later windows cannot be had without the earlier ones: statistics
    are sums from the first window on.
    """

    whole: Cache
    layers: tuple[int, ...]
    windows: int | None = None

    @property
    def manifest(self) -> Manifest:
        return replace(self.whole.manifest, layers=self.layers)

    @property
    def is_whole(self) -> bool:
        return self.layers == self.whole.manifest.layers and self.windows is None

    def chosen(self, journal: Journal) -> list[WindowEntry]:
        """Windows of one writer's journal that belong to the part, in the journal's order."""
        return [e for e in journal.windows if self.windows is None or e.window < self.windows]

    def pieces(self, entry: WindowEntry) -> Iterator[Piece]:
        """Files of one window."""
        held = [self.whole.manifest.layer_index(layer) for layer in self.layers]
        same = self.layers == self.whole.manifest.layers
        for origin, file in entry.files.items():
            folder, _, key = origin.rpartition("/c.")
            if origin.startswith("stats/"):
                shape = None if same or folder.endswith("/count") else self._statistic_shape(folder)
                yield Piece(origin, file, origin, shape)
            elif "/token/" in origin:
                yield Piece(origin, file, origin, None)
            else:
                window, layer, _ = map(int, key.split("."))
                if layer in held:
                    yield Piece(origin, file, layout.shard_file(folder, window, held.index(layer)), None)

    def convert(self, piece: Piece, data: bytes) -> tuple[bytes, FileEntry]:
        """Bytes of the piece in the part, from those in the whole cache."""
        if piece.shape is None:
            return data, piece.entry
        array = np.empty(piece.shape, "<f8")
        decode_chunk(memoryview(data), array)
        held = [self.whole.manifest.layer_index(layer) for layer in self.layers]
        stored = encode_chunk(np.ascontiguousarray(array[:, held]))
        return stored, FileEntry(len(stored), checksum(stored))

    def _statistic_shape(self, folder: str) -> tuple[int, ...]:
        manifest = self.whole.manifest
        per_layer = (layout.N_GROUPS, manifest.n_layers)
        return (*per_layer, manifest.d_model) if folder.endswith("/sum") else per_layer
