"""What a run reads from: one split of one or several caches of one identity, as one row of chunks."""

import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import cached_property
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from ..cache_format import CacheError, Manifest, layout
from ..cache_format.layout import (
    CHUNK,
    SITES,
    n_chunks,
    scale_array,
    shard_file,
    values_array,
    window_files,
)
from ..cache_format.open_shards import KEPT, Fetched, InWindow
from ..cache_format.statistics import Statistics, group_mask
from ..remote.staging import Stage, StagedFile
from .caches import open_caches
from .moments import group_shares, moments
from .order import Ints
from .read_ahead import FETCHERS, FEW, WINDOWS_AT_ONCE, Portion, read_ahead
from .selection import Selection
from .stored_rows import Rows

_FILE_BYTES = 512
"""A file's line in the journal, as Python objects."""
_SHARD_BYTES = 4096
"""An open shard's map, path and table entries, as Python objects."""


class NoTokensError(CacheError):
    """A split holds no token, or none that counts."""


class Source:
    """Split `split` of caches that share everything but their data."""

    def __init__(
        self,
        paths: Sequence[Path],
        split: str,
        *,
        layers: Sequence[int] | None = None,
        selection: Selection | None = None,
        io: str = "mmap",
        stage: Stage | None = None,
    ) -> None:
        """stage: where the caches are on stores; `paths` are its folders then, which fill while reading."""
        if stage is not None:
            stage.fetch_tables(split)
        self.stage = stage
        self._ahead: list[StagedFile] = []
        self.caches = open_caches(paths, io=io, check=stage is None)
        self.split, self.selection = split, selection or Selection()
        self.manifest: Manifest = self.caches[0].manifest
        self.layers = tuple(layers) if layers is not None else self.manifest.layers
        self._layer_indexes = [self.manifest.layer_index(layer) for layer in self.layers]
        self.own: tuple[int, ...] = tuple(range(len(self.layers)))
        """Places of the layers whose activations are read; fewer where other ranks read the rest"""
        self.bytes_read = 0
        """Stored bytes that `fill` has decoded"""
        self._counting = Lock()
        self._disk_waits = True
        """Whether the last `fill` took something that the kernel did not have"""
        self._splits = [cache[split] for cache in self.caches]
        self._chunk_ends = np.cumsum([s.n_chunks for s in self._splits])
        if not sum(len(s) for s in self._splits):
            raise NoTokensError(
                f"{paths[0]} has no tokens in split {split}; harvest with a larger --val-fraction"
                if split == "val"
                else f"{paths[0]} has no tokens in split {split}; let the harvest commit a window first"
            )
        self.kind = np.concatenate([s.token_column("kind") for s in self._splits])
        self.sink = np.concatenate([s.token_column("sink") for s in self._splits]).view(bool)
        self.sample = self._distinct_samples()
        ids = [s.token_column("token_id") for s in self._splits if self.selection.exclude_token_ids]
        # (token,): counts
        self.chosen = self.selection.chosen(self.kind, self.sink, np.concatenate(ids) if ids else None)
        if not self.chosen.any():
            raise NoTokensError(f"no token of split {split} is of the kinds {self.selection.kept_kinds}")

    @property
    def n_chunks(self) -> int:
        return int(self._chunk_ends[-1])

    @cached_property
    def window_chunks(self) -> tuple[int, ...]:
        """Chunks of each window, of all caches one after another."""
        return tuple(n_chunks(entry.tokens) for split in self._splits for entry in split.entries)

    def stage_ahead(self, now: Ints, ahead: Ints) -> None:
        """Windows that are wanted soon, and after them, by their place in `window_chunks`; none: all."""
        if self.stage is not None:
            windows = (*now, *ahead) if len(now) else range(len(self.window_chunks))
            self._ahead = [file for window in windows for file in self._staged_files(window)]

    def mixed_windows(self, asked: int | None) -> int | None:
        """Windows mixed with each other: as asked, or as many as the stage holds twice; None: all.

        Of all layers in use, also where other ranks read some of them: the order is the same for any ranks.
        """
        if asked is not None or self.stage is None:
            return asked
        windows = range(len(self.window_chunks))
        every = self._layer_indexes
        sizes = [sum(file.entry.size for file in self._staged_files(window, every)) for window in windows]
        return None if sum(sizes) <= self.stage.bound else max(1, self.stage.bound // (2 * max(sizes)))

    def _staged_files(self, window: int, indexes: Sequence[int] | None = None) -> list[StagedFile]:
        """Shards of a window, of the layers at these places in the cache; None: of those that are read."""
        owner = int(np.searchsorted(self._window_ends, window, side="right"))
        entry = self._splits[owner].entries[window - int(self._window_ends[owner - 1] if owner else 0)]
        arrays = [values_array(self.split, site) for site in SITES]
        if self.manifest.precision == "int8":
            arrays += [scale_array(self.split, site) for site in SITES]
        if indexes is None:
            indexes = [self._layer_indexes[place] for place in self.own]
        names = [shard_file(array, entry.window, index) for array in arrays for index in indexes]
        return [StagedFile(owner, name, entry.files[name]) for name in names]

    @cached_property
    def _window_ends(self) -> Ints:
        return np.cumsum([len(split.entries) for split in self._splits])

    def _stage(self, chunks: Ints) -> None:
        """Have the shards of these chunks at hand."""
        assert self.stage is not None
        owner, local = self._owners(chunks)
        windows: set[int] = set()
        for cache, split in enumerate(self._splits):
            numbers = np.unique(split.chunk_places(local[owner == cache]).window)
            place = {entry.window: nth for nth, entry in enumerate(split.entries)}
            before = int(self._window_ends[cache]) - len(split.entries)
            windows |= {before + place[number] for number in numbers.tolist()}
            split.forget_shards()  # an open one would keep its room on the disk
        now = [file for window in sorted(windows) for file in self._staged_files(window)]
        self.stage.hold(now, self._ahead)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.chosen.sum())

    @property
    def tokens_per_sample(self) -> float:
        """Mean over tokens (not over samples) of how many tokens of its sample there are."""
        _, counts = np.unique(self.sample[self.chosen], return_counts=True)
        return float((counts**2).sum() / counts.sum())

    @property
    def fingerprint(self) -> str:
        return "+".join(cache.fingerprint for cache in self.caches)

    def tokens_of(self, chunks: Ints) -> tuple[Ints, Ints]:
        """(place in a buffer that holds these chunks side by side, token number) of the tokens that count."""
        token = np.empty((len(chunks), CHUNK), np.int64)
        exists = np.empty((len(chunks), CHUNK), bool)
        first_token = np.concatenate([[0], np.cumsum([len(s) for s in self._splits])])
        owner, local = self._owners(chunks)
        for nth, split in enumerate(self._splits):
            mine = owner == nth
            places = split.chunk_places(local[mine])
            token[mine] = first_token[nth] + places.start[:, None] + np.arange(CHUNK)
            exists[mine] = np.arange(CHUNK) < places.tokens[:, None]
        place = np.flatnonzero(exists.ravel())
        number = token.ravel()[place]
        counts = self.chosen[number]
        return place[counts], number[counts]

    def only(self, place: int) -> "Source":
        """The same tokens, of the one layer at this place."""
        one = copy.copy(self)
        one.layers, one._layer_indexes = (self.layers[place],), [self._layer_indexes[place]]
        one.own = (0,)
        return one

    def allocate(self, n_chunks: int, sites: Sequence[str] = SITES) -> Rows:
        """Room for the stored numbers of n_chunks chunks, of the layers that are read.

        `fill` reads the sites that have some.
        """
        shape = (len(self.own), n_chunks * CHUNK)
        int8 = self.manifest.precision == "int8"
        codes = {s: np.empty((*shape, self.manifest.d_model), np.int8 if int8 else np.uint16) for s in sites}
        blocks = self.manifest.n_blocks if int8 else 0
        return Rows(codes, {site: np.empty((*shape, blocks), np.float16) for site in sites})

    def fill(self, rows: Rows, chunks: Ints, pool: Executor) -> None:
        """Decode `chunks` side by side into `rows`, with the threads of `pool`."""
        if self.stage is not None:
            self._stage(chunks)

        fetchers, self._disk_waits = FETCHERS if self._disk_waits else FEW, False

        def fetch(portion: Portion) -> Fetched:
            index = self._layer_indexes[self.own[portion.layer]]
            fetched = self._splits[portion.cache].fetch(portion.site, index, portion.chunks)
            if fetched.ask():
                self._disk_waits = True
            return fetched

        def decode(portion: Portion, fetched: Fetched) -> None:
            codes, scale = (part[portion.site] for part in rows)
            int8 = self.manifest.precision == "int8"
            read = fetched.decode(codes[portion.layer], scale[portion.layer] if int8 else None)
            with self._counting:
                self.bytes_read += read

        read_ahead(self._portions(chunks, tuple(rows.codes)), fetch, decode, pool, fetchers)

    def _portions(self, chunks: Ints, sites: Sequence[str]) -> Iterator[Portion]:
        """The chunks of these sites and every layer, by cache and window."""
        owner, local = self._owners(chunks)
        parts: list[tuple[int, list[InWindow]]] = []
        for cache, split in enumerate(self._splits):
            mine = np.flatnonzero(owner == cache)
            windows = split.by_window(local[mine], mine)
            for first in range(0, len(windows), WINDOWS_AT_ONCE):
                parts.append((cache, windows[first : first + WINDOWS_AT_ONCE]))
        for site, row in product(sites, range(len(self.own))):
            for cache, some in parts:
                yield Portion(cache, site, row, some)

    def stored_bytes(self, layers: Sequence[int]) -> int:
        """Of all tokens of the split, in the files of these layers (their places)."""
        arrays = [layout.values_array(self.split, site) for site in SITES]
        if self.manifest.precision == "int8":
            arrays += [layout.scale_array(self.split, site) for site in SITES]
        total = 0
        for split in self._splits:
            for entry in split.entries:
                names = [
                    layout.shard_file(array, entry.window, self._layer_indexes[layer])
                    for array in arrays
                    for layer in layers
                ]
                total += sum(entry.files[name].size for name in names)
        return total

    def memory_bytes(self) -> int:
        """At most: seven bytes a token for kind, sink, sample and whether it counts, eight more as they are
        read; the journals; and an index for each shard of the layers in use, as far as they are open.
        """
        windows = [entry for cache in self.caches for log in cache.journals for entry in log.windows]
        shards = len(window_files(self.split, 0, len(self.own), self.manifest.precision == "int8"))
        held = min(2 * KEPT, sum(shards * len(split.entries) for split in self._splits))
        indexes = held * (16 * self.manifest.chunks_per_window + _SHARD_BYTES)
        return 15 * len(self.kind) + sum(len(entry.files) for entry in windows) * _FILE_BYTES + indexes

    def statistics(self, site: str, selection: Selection | None = None) -> Statistics:
        """Moments of one site over the tokens that count, of the layers in use.

        The cache has them by kind, sinks apart. Of a kind of which only a share counts, or some ids do not,
        the moments are those of the whole kind, weighted by what is left of it.
        """
        chosen = selection or self.selection
        groups = group_mask(chosen.kept_kinds, chosen.sinks) * self._group_shares
        return moments(self._splits, site, groups, self._layer_indexes)

    @cached_property
    def _group_shares(self) -> npt.NDArray[np.float64]:
        return group_shares(self.kind, self.sink, self.chosen)

    def sink_shares(self) -> npt.NDArray[np.float64]:
        """(layer,): share that sinks have in the variance of mlp_out."""
        without = Selection(self.selection.kinds, (*self.selection.exclude, "sink"))
        whole, rest = self.statistics("mlp_out"), self.statistics("mlp_out", without)
        shares: npt.NDArray[np.float64] = 1 - rest.variance * rest.tokens / (whole.variance * whole.tokens)
        return shares

    def _owners(self, chunks: Ints) -> tuple[Ints, Ints]:
        """(cache, chunk inside it) of each chunk."""
        owner = np.searchsorted(self._chunk_ends, chunks, side="right")
        return owner, chunks - np.concatenate([[0], self._chunk_ends])[owner]

    def _distinct_samples(self) -> npt.NDArray[np.int32]:
        """Sample numbers, made distinct between caches."""
        distinct, start, offset = np.empty(len(self.kind), np.int32), 0, 0
        for split in self._splits:
            column = split.token_column("sample")
            np.add(column, np.int32(offset), out=distinct[start : start + len(column)])
            start, offset = start + len(column), offset + int(column.max(initial=-1)) + 1
        return distinct


def default_threads() -> int:
    """One a core, at most 16; of the cores of a machine on which several ranks run, their share."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores))
