"""Opening a cache: what it is, what it holds, and its numbers by token range or by chunk.

`open_cache` reads the manifest and the journals and checks that every file is there in its full size; it
reads no activations. A split's tokens are counted 0..len-1 in the order on disk.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import layout
from .codec import Floats, decode_chunk, dequantise, from_bf16_bits
from .errors import CacheError, DamagedCacheError
from .files import checksum, read_file
from .journal import Journal, WindowEntry, read_journal
from .manifest import Manifest, parse_manifest
from .metadata import ROOT, Extent
from .shard import Shard
from .statistics import SiteSums, Statistics, group_mask, summarise

MAX_LISTED = 20
OPEN_SHARDS = 4096
"""Shards kept open at a time; maps are limited by the system (65,530 on Linux)."""


class ChunkPlace(NamedTuple):
    """Where chunks lie; arrays of one length."""

    window: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    """chunk inside the shard"""
    tokens: npt.NDArray[np.int64]
    """1 to CHUNK"""
    start: npt.NDArray[np.int64]
    """number of the first token in the split"""


@dataclass
class Cache:
    """A cache on disk, committed part only."""

    path: Path
    manifest: Manifest
    journals: list[Journal]
    io: str

    def __getitem__(self, split: str) -> "Split":
        if split not in layout.SPLITS:
            raise CacheError(f"expected one of the splits {layout.SPLITS}, found {split!r}")
        return self._splits[split]

    @property
    def complete(self) -> bool:
        """Every writer has finished."""
        return all(journal.complete for journal in self.journals)

    @property
    def fingerprint(self) -> str:
        """Changes with the manifest and with every committed byte."""
        parts = [self.manifest.canonical()]
        parts += [repr(entry.files) for journal in self.journals for entry in journal.windows]
        return checksum("\n".join(parts).encode()) + checksum("".join(parts[::-1]).encode())

    @cached_property
    def _splits(self) -> dict[str, "Split"]:
        return {split: Split(self, split) for split in layout.SPLITS}

    def samples(self) -> dict[int, dict[str, Any]]:
        """Lines of samples.jsonl by sample number."""
        return {line["sample"]: line for line in self._log(layout.SAMPLES)}

    def rejected(self) -> list[dict[str, Any]]:
        """Lines of rejected.jsonl."""
        return self._log(layout.REJECTED)

    def _log(self, log: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for rank, journal in enumerate(self.journals):
            path = self.path / layout.log_name(log, rank)
            size, check = getattr(journal.logs, log)
            data = read_file(path)[:size]
            if checksum(data) != check:
                raise DamagedCacheError(f"{path} is not what the journal committed; copy it again")
            lines += [json.loads(line) for line in data.splitlines()]
        return lines


class Split:
    """The tokens of split train or val."""

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache, self.name, self.manifest = cache, name, cache.manifest
        entries = [entry for journal in cache.journals for entry in journal.windows if entry.split == name]
        self.entries: list[WindowEntry] = sorted(entries, key=lambda entry: entry.window)
        sizes = np.array([entry.tokens for entry in self.entries], np.int64)
        self._token_ends = np.cumsum(sizes)
        self._chunk_ends = np.cumsum(-(-sizes // layout.CHUNK))
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self._token_ends[-1]) if len(self._token_ends) else 0

    @property
    def n_chunks(self) -> int:
        return int(self._chunk_ends[-1]) if len(self._chunk_ends) else 0

    @property
    def bytes(self) -> int:
        """Stored bytes of all committed files."""
        return sum(file.size for entry in self.entries for file in entry.files.values())

    def chunk_places(self, chunks: npt.NDArray[np.int64]) -> ChunkPlace:
        """Windows, slots and token numbers of chunks 0..n_chunks-1."""
        nth = np.searchsorted(self._chunk_ends, chunks, side="right")
        before = np.concatenate([[0], self._chunk_ends])[nth]
        first = np.concatenate([[0], self._token_ends])[nth]
        slot = chunks - before
        start = first + slot * layout.CHUNK
        window = np.array([entry.window for entry in self.entries], np.int64)[nth]
        return ChunkPlace(window, slot, np.minimum(layout.CHUNK, self._token_ends[nth] - start), start)

    def decode(self, site: str, layer_index: int, window: int, slot: int, out: npt.NDArray[Any]) -> None:
        """Stored numbers of one chunk into `out`, (CHUNK, d_model) int8 or uint16, contiguous."""
        array = layout.values_array(self.name, site)
        self._shard(layout.shard_file(array, window, layer_index)).decode(slot, out)

    def decode_scale(
        self, site: str, layer_index: int, window: int, slot: int, out: npt.NDArray[np.float16]
    ) -> None:
        """Scales of one chunk into `out`, (CHUNK, block) float16."""
        array = layout.scale_array(self.name, site)
        self._shard(layout.shard_file(array, window, layer_index)).decode(slot, out)

    def read(
        self, site: str, *, layers: Sequence[int] | None = None, start: int = 0, stop: int | None = None
    ) -> Floats:
        """Activations of tokens start..stop-1: float32 (token, layer, d_model), in the order on disk.

        layers: numbers of the model's layers (default: all that are stored).
        """
        if site not in layout.SITES:
            raise CacheError(f"expected one of the sites {layout.SITES}, found {site!r}")
        chosen = [self.manifest.layer_index(layer) for layer in layers or self.manifest.layers]
        start, stop, _ = slice(start, stop).indices(len(self))
        out = np.empty((max(0, stop - start), len(chosen), self.manifest.d_model), np.float32)
        if not len(out):
            return out
        first, last = (int(np.searchsorted(self._token_ends, t, side="right")) for t in (start, stop - 1))
        begins = np.concatenate([[0], self._token_ends])
        before = np.concatenate([[0], self._chunk_ends])
        low = int(before[first] + (start - begins[first]) // layout.CHUNK)
        high = int(before[last] + (stop - 1 - begins[last]) // layout.CHUNK)
        places = self.chunk_places(np.arange(low, high + 1))
        for window, slot, tokens, begin in zip(*(column.tolist() for column in places), strict=True):
            rows = slice(max(start, begin), min(stop, begin + tokens))
            inside = slice(rows.start - begin, rows.stop - begin)
            for place, index in enumerate(chosen):
                values = self._values(site, index, window, slot)
                out[rows.start - start : rows.stop - start, place] = values[inside]
        return out

    def tokens(self) -> dict[str, npt.NDArray[Any]]:
        """The token table: one array a column, (len(self),), in the order on disk."""
        return {name: self.token_column(name) for name in layout.TOKEN_COLUMNS}

    def token_column(self, name: str) -> npt.NDArray[Any]:
        dtype = layout.TOKEN_COLUMNS[name]
        parts = [np.zeros(0, dtype)]
        for entry in self.entries:
            path = layout.window_file(layout.token_array(self.name, name), entry.window, 1)
            parts.append(read_array(self.cache.path, path, (self.manifest.window,), dtype)[: entry.tokens])
        return np.concatenate(parts)

    def counts(self) -> dict[str, int]:
        """Tokens by kind."""
        count = self.sums[1].reshape(2, len(layout.KINDS)).sum(axis=0)
        return dict(zip(layout.KINDS, count.tolist(), strict=True))

    @property
    def n_sinks(self) -> int:
        return int(self.sums[1][len(layout.KINDS) :].sum())

    def statistics(
        self, site: str, kinds: list[str] | None = None, sinks: bool | None = None
    ) -> Statistics:
        """Moments of one site over the tokens of these kinds (None: all); see `group_mask`."""
        sums, count = self.sums
        return summarise(sums[site], count, group_mask(kinds, sinks))

    @cached_property
    def sums(self) -> tuple[dict[str, SiteSums], npt.NDArray[np.int64]]:
        """Sums over all writers: each one's last window holds the sums of all its windows."""
        last = {entry.window % self.manifest.world_size: entry.window for entry in self.entries}
        shape = (self.manifest.n_layers, self.manifest.d_model)
        sums = {site: SiteSums.zeros(*shape) for site in layout.SITES}
        count = np.zeros(layout.N_GROUPS, np.int64)
        for window in last.values():
            part, n = read_site_sums(self.cache.path, self.manifest, self.name, window)
            count += n
            for site in layout.SITES:
                sums[site].add(part[site])
        return sums, count

    def _values(self, site: str, layer_index: int, window: int, slot: int) -> Floats:
        int8 = self.manifest.precision == "int8"
        codes = np.empty((layout.CHUNK, self.manifest.d_model), np.int8 if int8 else np.uint16)
        self.decode(site, layer_index, window, slot, codes)
        if not int8:
            return from_bf16_bits(codes)
        scale = np.empty((layout.CHUNK, self.manifest.n_blocks), np.float16)
        self.decode_scale(site, layer_index, window, slot, scale)
        return dequantise(codes, scale)

    def _open_shard(self, name: str) -> Shard:
        return Shard(self.cache.path / name, self.manifest.chunks_per_window, self.cache.io)


def open_cache(path: str | Path, *, io: str = "mmap", check: bool = True) -> Cache:
    """Open a cache for reading; io is "mmap" or "pread".

    Raises CacheError where `path` is no cache of this version, DamagedCacheError where files are missing or
    have another size than the journal says (all of them listed).
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    journals = [read_journal(folder, rank) for rank in range(manifest.world_size)]
    for journal in journals:
        if journal.manifest_crc32c not in (None, checksum(manifest.canonical().encode())):
            raise DamagedCacheError(f"{folder / ROOT}: the manifest is not the one that {journal.path} names")
    cache = Cache(folder, manifest, journals, io)
    if check:
        faults = missing_files(cache)
        if faults:
            more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            raise DamagedCacheError(
                f"{folder}: {len(faults)} faulty files: {'; '.join(faults[:MAX_LISTED])}{more}. "
                "Copy them again, or harvest again"
            )
    return cache


def missing_files(cache: Cache) -> list[str]:
    """One line for each committed file that is absent or has another size."""
    faults = []
    for journal in cache.journals:
        for entry in journal.windows:
            for name, file in entry.files.items():
                try:
                    size = (cache.path / name).stat().st_size
                except FileNotFoundError:
                    faults.append(f"{name} is missing")
                else:
                    if size != file.size:
                        faults.append(f"{name} has {size} bytes, expected {file.size}")
    return faults


def read_manifest(folder: Path) -> Manifest:
    path = folder / ROOT
    if not path.exists():
        raise CacheError(f"{folder} is no cache: expected a file {ROOT} in it, found none")
    try:
        document = json.loads(path.read_bytes())
        attribute = document["attributes"]["clt"]
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise CacheError(f"{path} does not describe a cache of clt ({fault!r})") from fault
    return parse_manifest(attribute)


def read_extents(folder: Path, manifest: Manifest) -> dict[str, Extent]:
    """Length of each split's arrays, as the journals of all writers have it now."""
    extents = dict.fromkeys(layout.SPLITS, (0, 0))
    for rank in range(manifest.world_size):
        for entry in read_journal(folder, rank).windows:
            tokens, windows = extents[entry.split]
            end = entry.window * manifest.window + entry.tokens
            extents[entry.split] = (max(tokens, end), max(windows, entry.window + 1))
    return extents


def read_site_sums(
    folder: Path, manifest: Manifest, split: str, window: int
) -> tuple[dict[str, SiteSums], npt.NDArray[np.int64]]:
    """Sums over all windows of one writer up to and including `window`, and tokens by group."""
    per_layer = (layout.N_GROUPS, manifest.n_layers)
    sums = {}
    for site in layout.SITES:
        arrays = []
        for statistic in layout.STATISTICS:
            shape = per_layer + (manifest.d_model,) * (statistic == "sum")
            array = layout.statistic_array(split, site, statistic)
            path = layout.window_file(array, window, 1 + len(shape))
            arrays.append(read_array(folder, path, shape, np.dtype("<f8")))
        sums[site] = SiteSums(*arrays)
    path = layout.window_file(layout.count_array(split), window, 2)
    return sums, read_array(folder, path, (layout.N_GROUPS,), np.dtype("<i8"))


def read_array(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The array in a file that is one chunk."""
    out = np.empty(shape, dtype)
    try:
        decode_chunk(memoryview(read_file(folder / name)), out)
    except DamagedCacheError as fault:
        raise DamagedCacheError(f"{folder / name}: {fault}") from fault
    return out
