"""The shards of one split: opened when their chunks are wanted, and as many as may be kept open for good.

A cache can have far more shards than a process may have files. So a shard stays open while its chunks are
read, and longer only where there is room; what is not kept is opened again for the next buffer, which costs
little (a chunk takes ten times as long to decode).
"""

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from . import layout
from .errors import DamagedCacheError
from .manifest import Manifest
from .shard import Shard

KEPT = 4096
"""Shards that a process keeps open at most; maps are limited by the system (65,530 on Linux)."""
SHARE_OF_FILES = 4
"""Kept shards take at most one in so many of the files that a process may open; those of one fill, too."""

_KEPT: WeakSet[Shard] = WeakSet()
"""Of all splits of the process; they go with their split."""

Place = tuple[int, int, int]
"""(window, slot, place in the caller's arrays) of a chunk."""


class Wanted(NamedTuple):
    """Chunks of one shard, or of a shard of codes and that of their scales."""

    window: int
    shards: list[Shard]
    slots: list[tuple[int, int]]
    """(slot, place in the caller's arrays)"""


class Fetched(NamedTuple):
    """Chunks of one layer and site: their shards are open, and the system was asked for their bytes."""

    where: tuple[str, str]
    """For errors: the split; layer and site"""
    wanted: list[Wanted]

    def decode(self, codes: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None = None) -> int:
        """Fill the chunks' places in `codes` (token, d_model) and, int8 only, `scale` (token, block).

        How many stored bytes that were.
        """
        arrays, read = [codes] if scale is None else [codes, scale], 0
        for window, shards, slots in self.wanted:
            try:
                for slot, at in slots:
                    part = slice(at * layout.CHUNK, (at + 1) * layout.CHUNK)
                    for shard, array in zip(shards, arrays, strict=True):
                        read += shard.decode(slot, array[part])
            except DamagedCacheError as fault:
                raise _named(fault, window, self.where) from fault
        return read


class OpenShards:
    """How a split's shards are reached; io is "mmap" or "pread". Thread-safe."""

    def __init__(self, folder: Path, split: str, manifest: Manifest, io: str) -> None:
        self._folder, self._split, self._manifest, self._io = str(folder), split, manifest, io
        self._kept: dict[str, Shard] = {}

    def fetch(self, site: str, layer_index: int, places: Iterable[Place], *, ask: bool = True) -> Fetched:
        """Open the shards of the chunks at `places`; ask: have the system read what will be decoded.

        Raises DamagedCacheError with file, window, layer and site.
        """
        slots: dict[int, list[tuple[int, int]]] = {}
        for window, slot, at in places:
            slots.setdefault(window, []).append((slot, at))
        layer = self._manifest.layers[layer_index]
        fetched = Fetched((f"split {self._split}", f"layer {layer}, site {site}"), [])
        for window, wanted in slots.items():
            try:
                shards = [self._open(name) for name in self._names(site, layer_index, window)]
                for shard in shards if ask else ():
                    shard.will_need(slot for slot, _ in wanted)
            except DamagedCacheError as fault:
                raise _named(fault, window, fetched.where) from fault
            fetched.wanted.append(Wanted(window, shards, wanted))
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
            keep = len(_KEPT) < shards_at_a_time()
            # to map a file for one chunk costs more than to copy the chunk
            io = self._io if keep else "pread"
            shard = Shard(f"{self._folder}/{name}", self._manifest.chunks_per_window, io)
            if keep:
                _KEPT.add(shard)
                shard = self._kept.setdefault(name, shard)
        return shard


def shards_at_a_time() -> int:
    """How many a process may keep open, and how many more each of those who read may open for a while."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return KEPT if allowed == resource.RLIM_INFINITY else min(KEPT, allowed // SHARE_OF_FILES)


def _named(fault: DamagedCacheError, window: int, where: tuple[str, str]) -> DamagedCacheError:
    split, layer = where
    return DamagedCacheError(f"{split}, window {window}, {layer}: {fault}")
