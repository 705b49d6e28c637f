"""The shards of one split: opened when their chunks are wanted, and as many as may be kept open for good.

A cache can have far more shards than a process may have files. So a shard stays open while its chunks are
read, and longer only where there is room; what is not kept is opened again for the next buffer, which costs
little (a chunk takes ten times as long to decode).
"""

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from . import layout
from .errors import DamagedCacheError
from .manifest import Manifest
from .shard import Shard
from .small_frames import decode_frames

KEPT = 4096
"""Shards that a process keeps open at most; maps are limited by the system (65,530 on Linux)."""
SHARE_OF_FILES = 4
"""Kept shards take at most one in so many of the files that a process may open; those of one fill, too."""
FILES_OF_ONE = 2
"""Files that a kept shard takes: with mmap its own, and the map's."""

_KEPT: WeakSet[Shard] = WeakSet()
"""Of all splits of the process; they go with their split."""


class InWindow(NamedTuple):
    """Chunks of one window that are wanted, and where they go."""

    window: int
    slots: list[int]
    at: list[int]
    """Their places in the caller's arrays"""


class Wanted(NamedTuple):
    """Chunks of one shard, or of a shard of codes and that of their scales."""

    shards: list[Shard]
    chunks: InWindow


class Fetched(NamedTuple):
    """Chunks of one layer and site, whose shards are open."""

    where: tuple[str, str]
    """For errors: the split; layer and site"""
    wanted: list[Wanted]

    def ask(self) -> bool:
        """Have the system read what it seems not to have; to ask for all costs a twentieth of decoding it.

        Whether it was asked.
        """
        if all(self._at_hand(wanted) for wanted in (self.wanted[0], self.wanted[-1])):
            return False
        for shards, chunks in self.wanted:
            with _naming(chunks.window, self.where):
                for shard in shards:
                    shard.will_need(chunks.slots)
        return True

    def _at_hand(self, wanted: Wanted) -> bool:
        """By one chunk of codes: pages come and go in large numbers."""
        with _naming(wanted.chunks.window, self.where):
            return wanted.shards[0].at_hand(wanted.chunks.slots[0])

    def decode(self, codes: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None = None) -> int:
        """Fill the chunks' places in `codes` (token, d_model) and, int8 only, `scale` (token, block).

        Both contiguous. How many stored bytes that were.
        """
        read = self._decode_each(0, codes)
        return read if scale is None else read + self._decode_scales(scale)

    def _decode_scales(self, scale: npt.NDArray[np.float16]) -> int:
        frames, places = [], []
        for shards, chunks in self.wanted:
            with _naming(chunks.window, self.where):
                frames += shards[1].copies(chunks.slots)
            places += chunks.at
        if not decode_frames(frames, scale.reshape(-1, layout.CHUNK, scale.shape[1]), places):
            return self._decode_each(1, scale)  # which names the one that is damaged
        return sum(map(len, frames))

    def _decode_each(self, nth: int, out: npt.NDArray[Any]) -> int:
        """One chunk at a time, of the nth shard of each window."""
        read = 0
        for shards, (window, slots, at) in self.wanted:
            with _naming(window, self.where):
                for slot, place in zip(slots, at, strict=True):
                    part = slice(place * layout.CHUNK, (place + 1) * layout.CHUNK)
                    read += shards[nth].decode(slot, out[part])
        return read


class OpenShards:
    """How a split's shards are reached; io is "mmap" or "pread". Thread-safe."""

    def __init__(self, folder: Path, split: str, manifest: Manifest, io: str) -> None:
        self._folder, self._split, self._manifest, self._io = str(folder), split, manifest, io
        self._kept: dict[str, Shard] = {}

    def fetch(self, site: str, layer_index: int, wanted: Iterable[InWindow]) -> Fetched:
        """Open the shards of these chunks.

        Raises DamagedCacheError with file, window, layer and site.
        """
        layer = self._manifest.layers[layer_index]
        fetched = Fetched((f"split {self._split}", f"layer {layer}, site {site}"), [])
        for chunks in wanted:
            with _naming(chunks.window, fetched.where):
                shards = [self._open(name) for name in self._names(site, layer_index, chunks.window)]
            fetched.wanted.append(Wanted(shards, chunks))
        return fetched

    def forget(self) -> None:
        """Close what is kept; shards that are being read stay open until they are done with."""
        self._kept.clear()

    def _names(self, site: str, layer_index: int, window: int) -> list[str]:
        """Codes, and for int8 their scales."""
        arrays = [layout.values_array(self._split, site)]
        if self._manifest.precision == "int8":
            arrays.append(layout.scale_array(self._split, site))
        return [layout.shard_file(array, window, layer_index) for array in arrays]

    def _open(self, name: str) -> Shard:
        shard = self._kept.get(name)
        if shard is None:
            keep = FILES_OF_ONE * len(_KEPT) < files_at_a_time()
            # to map a file for one chunk costs more than to copy the chunk
            io = self._io if keep else "pread"
            shard = Shard(f"{self._folder}/{name}", self._manifest.chunks_per_window, io)
            if keep:
                _KEPT.add(shard)
                shard = self._kept.setdefault(name, shard)
        return shard


def files_at_a_time() -> int:
    """Of shards that a process keeps open, and as many again of those that each reader opens for a while."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return KEPT if allowed == resource.RLIM_INFINITY else min(KEPT, allowed // SHARE_OF_FILES)


@contextmanager
def _naming(window: int, where: tuple[str, str]) -> Iterator[None]:
    """Errors say where in the cache the file belongs."""
    try:
        yield
    except DamagedCacheError as fault:
        split, layer = where
        raise DamagedCacheError(f"{split}, window {window}, {layer}: {fault}") from fault
