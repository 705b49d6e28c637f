"""Opening a cache: what it is, what it holds, and its numbers by token range or by chunk.

`open_cache` reads the manifest and the journals and checks that every file is there in its full size; it
reads no activations. A split's tokens are counted 0..len-1 in the order on disk.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google_crc32c import extend, value

from . import layout
from .bf16 import from_bf16_bits
from .errors import CacheError, DamagedCacheError
from .files import checksum
from .int8 import Floats, dequantise
from .journal import Journal, WindowEntry, check_windows, read_journal
from .manifest import Manifest
from .metadata import ROOT
from .open_shards import Fetched, InWindow, OpenShards
from .statistics import SiteSums, Statistics, group_mask, summarise
from .stored import missing_files, read_array, read_log, read_site_sums
from .stored import read_manifest as read_manifest

IO = ("mmap", "pread")
MAX_LISTED = 20


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
    def windows(self) -> list[WindowEntry]:
        """Every committed window, writer by writer."""
        return [entry for journal in self.journals for entry in journal.windows]

    @property
    def n_files(self) -> int:
        """Committed files."""
        return sum(len(entry.files) for entry in self.windows)

    def check_files(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """DamagedCacheError where files are missing or have another size than the journal says (all listed).

        progress is told how many more files were looked at.
        """
        faults = missing_files(self.path, self.windows, progress)
        if faults:
            more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
            raise DamagedCacheError(
                f"{self.path}: {len(faults)} faulty files: {'; '.join(faults[:MAX_LISTED])}{more}. "
                "Copy them again, or harvest again"
            )

    @property
    def complete(self) -> bool:
        """Every writer has finished."""
        return all(journal.complete for journal in self.journals)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the manifest and with every committed byte."""
        manifest, windows = self.manifest.canonical().encode(), self.windows
        down, up = value(manifest), 0
        for entry in windows:
            down = extend(down, f"\n{entry.files!r}".encode())
        for entry in reversed(windows):
            up = extend(up, repr(entry.files).encode())
        return f"{down:08x}{extend(up, manifest):08x}"

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
            lines += read_log(self.path / layout.log_name(log, rank), getattr(journal.logs, log))[1]
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
        self._windows = np.array([entry.window for entry in self.entries], np.int64)
        self._shards = OpenShards(cache.path, name, cache.manifest, cache.io)

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
        return ChunkPlace(
            self._windows[nth], slot, np.minimum(layout.CHUNK, self._token_ends[nth] - start), start
        )

    def forget_shards(self) -> None:
        """Close the shards that are kept open."""
        self._shards.forget()

    def fetch(self, site: str, layer_index: int, wanted: Iterable[InWindow]) -> Fetched:
        """Open the shards of these chunks; see `OpenShards`."""
        return self._shards.fetch(site, layer_index, wanted)

    def by_window(self, chunks: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> list[InWindow]:
        """The chunks of each window, windows ascending; `at`: where each chunk goes."""
        windows, slots = self.chunk_places(chunks)[:2]
        order = np.argsort(windows, kind="stable")
        edges = np.flatnonzero(np.diff(windows[order])) + 1
        return [
            InWindow(int(windows[part[0]]), slots[part].tolist(), at[part].tolist())
            for part in np.split(order, edges)
            if len(part)
        ]

    def read(
        self, site: str, *, layers: Sequence[int] | None = None, start: int = 0, stop: int | None = None
    ) -> Floats:
        """Activations of tokens start..stop-1: float32 (token, layer, d_model), in the order on disk.

        layers: numbers of the model's layers (default: all that are stored).
        """
        if site not in layout.SITES:
            raise CacheError(f"expected one of the sites {layout.SITES}, found {site!r}")
        wanted = self.manifest.layers if layers is None else layers
        chosen = [self.manifest.layer_index(layer) for layer in wanted]
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
            if name == "kind" and parts[-1].max() >= len(layout.KINDS):
                raise DamagedCacheError(
                    f"{self.cache.path / path}: expected kinds below {len(layout.KINDS)}, "
                    f"found {parts[-1].max()}; copy it again"
                )
        return np.concatenate(parts)

    def counts(self) -> dict[str, int]:
        """Tokens by kind."""
        count = self.sums[1].reshape(2, len(layout.KINDS)).sum(axis=0)
        return dict(zip(layout.KINDS, count.tolist(), strict=True))

    @property
    def n_sinks(self) -> int:
        return int(self.sums[1][len(layout.KINDS) :].sum())

    def statistics(self, site: str, kinds: list[str] | None = None, sinks: bool | None = None) -> Statistics:
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
        chunk = self.fetch(site, layer_index, [InWindow(window, [slot], [0])])
        if self.manifest.precision == "bf16":
            bits = np.empty((layout.CHUNK, self.manifest.d_model), np.uint16)
            chunk.decode(bits)
            return from_bf16_bits(bits)
        codes = np.empty((layout.CHUNK, self.manifest.d_model), np.int8)
        scale = np.empty((layout.CHUNK, self.manifest.n_blocks), np.float16)
        chunk.decode(codes, scale)
        return dequantise(codes, scale)


def open_cache(path: str | Path, *, io: str = "mmap", check: bool = True) -> Cache:
    """Open a cache for reading; io is "mmap" or "pread". check=False leaves the files themselves unseen.

    Raises CacheError where `path` is no cache of this version, DamagedCacheError where files are missing or
    have another size than the journal says (all of them listed).
    """
    if io not in IO:
        raise CacheError(f"io: expected one of {IO}, found {io!r}")
    folder = Path(path)
    manifest = read_manifest(folder)
    journals = [read_journal(folder, rank) for rank in range(manifest.world_size)]
    for rank, journal in enumerate(journals):
        if journal.manifest_crc32c not in (None, checksum(manifest.canonical().encode())):
            raise DamagedCacheError(f"{folder / ROOT}: the manifest is not the one that {journal.path} names")
        check_windows(journal, rank, manifest)
    cache = Cache(folder, manifest, journals, io)
    if check:
        cache.check_files()
    return cache
