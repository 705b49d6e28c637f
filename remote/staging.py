"""Caches on stores, read through local folders that hold a bounded number of their bytes.

The folder of a staged cache has its manifest, journals, token table and statistics, whole; its shards come
when they are asked for, and go when others need their room. Each is checked against the journal on arrival,
and so is one that an earlier process left, before it is used.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from ..cache_format import Cache, CacheError, layout, open_cache
from ..cache_format.files import write_file
from ..cache_format.journal import FileEntry, WindowEntry
from .address import remote_address
from .copying import THREADS, open_from
from .store import FileCheck, Store

COLUMNS = ("kind", "sink", "sample", "token_id")
"""Of the token table, those that training reads."""


class StagedFile(NamedTuple):
    cache: int
    """Which of the caches"""
    name: str
    entry: FileEntry


class Stage:
    """One split of several caches, some of them on stores; bound: bytes of its shards, of all together."""

    def __init__(
        self, names: Sequence[Path], split: str, folder: Path, bound: int, threads: int = THREADS
    ) -> None:
        self.bound = bound
        self.stores = [Store(address) if (address := remote_address(name)) else None for name in names]
        self.folders = [
            folder / folder_name(store.address) if store else name
            for name, store in zip(names, self.stores, strict=True)
        ]
        self.caches = [self._begin(number) for number in range(len(names))]
        self._pool = ThreadPoolExecutor(threads, "clt-stage")
        self._here: dict[StagedFile, Future[None]] = {}
        """Files that are there or on their way; those used last come last."""
        self._left: dict[str, int] = self._leftovers(split)
        """Shards of earlier processes, by path, that nobody has asked for yet."""

    def close(self) -> None:
        """Stop fetching; what is there stays."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def bytes_read(self) -> int:
        """From all stores."""
        return sum(store.bytes_read for store in self.stores if store)

    def fetch_tables(self, split: str) -> None:
        """Token table and statistics of a split, whole."""
        wanted = [
            StagedFile(number, name, entry.files[name])
            for number, cache in enumerate(self.caches)
            if self.stores[number]
            for entry in cache[split].entries
            for name in _tables(cache, entry)
        ]
        list(self._pool.map(self._arrive, wanted))

    def hold(self, now: Sequence[StagedFile], ahead: Sequence[StagedFile]) -> None:
        """Wait until the files `now` are there; those `ahead` are fetched meanwhile, in that order.

        Others go, the longest unused first, as far as their room is needed. Raises CacheError where the
        bound cannot hold what is asked for, and what fetching raised.
        """
        wanted = dict.fromkeys([*now, *ahead])
        size = sum(file.entry.size for file in wanted)
        if size > self.bound:
            raise CacheError(
                f"--stage-gb: expected at least {size / 1e9:.3g}, found {self.bound / 1e9:.3g}; "
                "give more, or fewer --shuffle-windows"
            )
        self._make_room(wanted, size)
        for file in wanted:
            future = self._here.pop(file, None)
            if future is None or future.cancelled() or (future.done() and future.exception()):
                future = self._pool.submit(self._arrive, file)
            self._here[file] = future
        for file in now:
            self._here[file].result()

    def path(self, file: StagedFile) -> Path:
        return self.folders[file.cache] / file.name

    def _begin(self, number: int) -> Cache:
        store, folder = self.stores[number], self.folders[number]
        if store is None:
            return open_cache(folder)
        return open_from(store, folder)

    def _arrive(self, file: StagedFile) -> None:
        """Have the file in its folder, whole and checked."""
        store, path = self.stores[file.cache], self.path(file)
        if store is None:
            return
        check = FileCheck(file.entry)
        if path.exists():
            try:
                check(path.read_bytes())
                return
            except CacheError:
                path.unlink()
        data = store.get(file.name, check)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)

    def _make_room(self, wanted: Iterable[StagedFile], size: int) -> None:
        """Delete until `wanted` and what stays beside it fit."""
        keep = set(wanted)
        for file in keep:
            self._left.pop(str(self.path(file)), None)
        others = [file for file in self._here if file not in keep]
        beside = sum(file.entry.size for file in others) + sum(self._left.values())
        while self._left and size + beside > self.bound:
            path, length = self._left.popitem()
            os.unlink(path)
            beside -= length
        for file in others:
            if size + beside <= self.bound:
                break
            self._drop(file)
            beside -= file.entry.size

    def _drop(self, file: StagedFile) -> None:
        future = self._here.pop(file)
        if not future.cancel():
            wait([future])
        if self.stores[file.cache]:
            self.path(file).unlink(missing_ok=True)

    def _leftovers(self, split: str) -> dict[str, int]:
        found = {}
        for store, folder in zip(self.stores, self.folders, strict=True):
            for path in (folder / split).glob("mlp_*/c.*") if store else ():
                found[str(path)] = path.stat().st_size
        return found


def open_described(address: str, into: Path) -> Cache:
    """A cache on a store as `clt info` tells of it: journals, statistics, kinds and what was rejected come to
    the folder `into`, and no shard."""
    store = Store(address)
    cache = open_from(store, into)

    def fetch(name: str, entry: FileEntry) -> None:
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, store.get(name, FileCheck(entry)))

    wanted = {
        name: entry.files[name] for entry in cache.windows for name in _tables(cache, entry, ("kind", "sink"))
    }
    with ThreadPoolExecutor(THREADS, "clt-info") as pool:
        list(pool.map(fetch, wanted.keys(), wanted.values()))
    for rank, journal in enumerate(cache.journals):
        if size := journal.logs[1].size:
            name = layout.log_name(layout.REJECTED, rank)
            write_file(into / name, store.get(name)[:size])
    return cache


def _tables(cache: Cache, entry: WindowEntry, columns: Sequence[str] = COLUMNS) -> list[str]:
    """Files of a window that a reader wants whole."""
    names = [layout.token_array(entry.split, column) for column in columns]
    wanted = [layout.window_file(name, entry.window, 1) for name in names]
    world = cache.manifest.world_size
    last = max(e.window for e in cache[entry.split].entries if e.window % world == entry.window % world)
    if entry.window == last:  # each writer's last window has the sums of all its windows
        wanted += [name for name in entry.files if name.startswith("stats/")]
    return wanted


def folder_name(address: str) -> str:
    """A folder's name for an address."""
    return f"{address.rpartition('/')[2]}-{hashlib.blake2b(address.encode(), digest_size=4).hexdigest()}"
