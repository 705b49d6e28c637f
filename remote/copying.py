"""Copying a cache, or a part of it, between folders and stores; `clt push` and `clt pull`.

A window's files go first, the journal that names them after; so whatever was copied when the copying was
cut off is a cache, and copying again goes on from there.
"""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from ..cache_format import Cache, CacheError, DamagedCacheError, Manifest, layout, open_cache
from ..cache_format.files import read_file, write_file
from ..cache_format.folder import extents_of
from ..cache_format.journal import (
    FileEntry,
    WindowEntry,
    final_line,
    header_line,
    read_journal,
    window_line,
)
from ..cache_format.manifest import parse_manifest
from ..cache_format.metadata import ROOT, documents
from ..cache_format.strict_json import parse_json
from ..stopping import StopRequested
from .address import remote_address
from .part import Part, Piece
from .store import Check, FileCheck, MissingError, Store

THREADS = 16
"""Files on their way at a time: most of the time is waiting."""


class Place(Protocol):
    """A folder or a store."""

    def get(self, name: str, check: Check | None = None) -> bytes: ...

    def put(self, name: str, data: bytes) -> None: ...

    def sizes(self, below: str = "") -> dict[str, int]: ...


class Folder:
    """A local folder as a place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str, check: Check | None = None) -> bytes:
        if not (self.path / name).exists():
            raise MissingError(f"{self.path} has no file {name}; expected a cache there")
        data = read_file(self.path / name)
        try:
            if check is not None:
                check(data)
        except CacheError as fault:
            raise DamagedCacheError(
                f"{self.path / name}: {fault}; restore it from a copy, or harvest again"
            ) from fault
        return data

    def put(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)

    def sizes(self, below: str = "") -> dict[str, int]:
        root = str(self.path)
        found = {}
        for folder, _, names in os.walk(os.path.join(root, below)):
            for name in names:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, root)] = os.path.getsize(path)
        return found


class Copied(NamedTuple):
    files: int
    """That were copied now"""
    bytes: int
    kept: int
    """That were there already"""
    windows: int
    """In the target"""
    layers: tuple[int, ...]


def place_of(name: str | Path) -> Place:
    address = remote_address(name)
    return Store(address) if address else Folder(Path(name))


def open_from(origin: Place, into: Path) -> Cache:
    """The cache at a place as its manifest and journals tell it, which are copied to the folder `into`."""
    here = Folder(into)
    here.put(ROOT, origin.get(ROOT, _manifest))
    for rank in range(open_cache(into, check=False).manifest.world_size):
        name = layout.log_name(layout.JOURNAL, rank)

        def check(data: bytes, name: str = name, rank: int = rank) -> None:
            here.put(name, data)
            read_journal(into, rank)

        with suppress(MissingError):  # this writer has not begun
            origin.get(name, check)
    return open_cache(into, check=False)


def copy_cache(
    origin: Place,
    target: Place,
    *,
    layers: str | None = None,
    windows: int | None = None,
    threads: int = THREADS,
    begin: Callable[[int], None] = lambda total: None,
    progress: Callable[[int], None] = lambda size: None,
) -> Copied:
    """Copy a cache; `layers` as in `--layers`; windows: the first so many of each split.

    Every file is checked against the journal on arrival. begin is told the bytes to copy, progress how many
    more were. Raises CacheError where the target is another cache.
    """
    if isinstance(target, Store):
        target.require_writable()
    with tempfile.TemporaryDirectory() as folder:
        whole = open_from(origin, Path(folder))
        part = Part(whole, layout.parse_layers(layers, whole.manifest.layers), windows)
        if not any(part.chosen(journal) for journal in whole.journals):
            raise CacheError("there is nothing to copy: expected a committed window, found none")
        return _Copying(origin, target, part, threads, progress).run(begin)


def _manifest(document: bytes) -> Manifest:
    try:
        return parse_manifest(parse_json(document)["attributes"]["clt"])
    except (ValueError, KeyError, TypeError) as fault:
        raise CacheError(f"it does not describe a cache of clt ({fault!r})") from fault


class _Copying:
    def __init__(
        self, origin: Place, target: Place, part: Part, threads: int, progress: Callable[[int], None]
    ) -> None:
        self.origin, self.target, self.part, self.progress = origin, target, part, progress
        self.threads = threads
        self.files = self.bytes = self.kept = 0
        self.described: dict[str, bytes] = {}

    def run(self, begin: Callable[[int], None]) -> Copied:
        part, there = self.part, self.target.sizes()
        self._claim(there)
        begin(
            sum(
                piece.entry.size
                for journal in part.whole.journals
                for entry in part.chosen(journal)
                for piece in part.pieces(entry)
            )
        )
        committed: list[WindowEntry] = []
        for rank in range(part.manifest.world_size):
            self._copy_writer(rank, there, committed)
        self._describe(committed)
        self._verify(committed)
        return Copied(self.files, self.bytes, self.kept, len(committed), part.layers)

    def _claim(self, there: dict[str, int]) -> None:
        """Name the manifest, or find that it is the one that is there."""
        name = documents(self.part.manifest, dict.fromkeys(layout.SPLITS, (0, 0)))[ROOT]
        if ROOT in there:
            differing = _manifest(self.target.get(ROOT)).differences(self.part.manifest)
            if differing:
                raise CacheError(
                    "the target holds another cache, or other layers of this one; copy to another place. "
                    f"Differences (there -> now): {'; '.join(differing)}"
                )
        elif there:
            raise CacheError(
                f"the target is not empty and no cache (it has {min(there)}); choose another place"
            )
        else:
            self.target.put(ROOT, name)

    def _describe(self, committed: list[WindowEntry]) -> None:
        """Zarr's documents, for readers that know no journal."""
        for name, data in documents(self.part.manifest, extents_of(self.part.manifest, committed)).items():
            if self.described.get(name) != data:
                self.target.put(name, data)
                self.described[name] = data

    def _copy_writer(self, rank: int, there: dict[str, int], committed: list[WindowEntry]) -> None:
        """One writer's windows, which join `committed`."""
        journal, part = self.part.whole.journals[rank], self.part
        if journal.manifest_crc32c is None:
            return
        text = header_line(part.manifest.canonical())
        chosen = part.chosen(journal)
        logs = chosen[-1].logs if chosen and len(chosen) < len(journal.windows) else journal.logs
        for log, committed_log in zip((layout.SAMPLES, layout.REJECTED), logs, strict=True):
            self._copy_log(layout.log_name(log, rank), committed_log)
        with ThreadPoolExecutor(self.threads, "clt-copy") as pool:
            for entry in chosen:
                before = self.files
                files = {}
                for name, file, sent in pool.map(lambda piece: self._copy(piece, there), part.pieces(entry)):
                    files[name] = file
                    self._count(file, sent)
                committed.append(replace(entry, files=files))
                text += window_line(committed[-1])
                if self.files > before:
                    self.target.put(layout.log_name(layout.JOURNAL, rank), text)
                    self._describe(committed)
                StopRequested.check()
        if journal.complete and len(chosen) == len(journal.windows):
            text += final_line(journal.logs)
        self.target.put(layout.log_name(layout.JOURNAL, rank), text)

    def _copy_log(self, name: str, committed: FileEntry) -> None:
        """The committed part of samples.jsonl or rejected.jsonl."""
        check = FileCheck(committed)
        data = self.origin.get(name, lambda data: check(data[: committed.size]))
        self.target.put(name, data[: committed.size])

    def _copy(self, piece: Piece, there: dict[str, int]) -> tuple[str, FileEntry, bool]:
        """One file, unless it is there: its name, what the journal says of it, whether it was copied."""
        StopRequested.check()
        if piece.shape is None and there.get(piece.name) == piece.entry.size:
            return piece.name, piece.entry, False
        data, entry = self.part.convert(piece, self.origin.get(piece.origin, FileCheck(piece.entry)))
        missing = there.get(piece.name) != entry.size
        if missing:
            self.target.put(piece.name, data)
        return piece.name, entry, missing

    def _count(self, file: FileEntry, sent: bool) -> None:
        if sent:
            self.files, self.bytes = self.files + 1, self.bytes + file.size
        else:
            self.kept += 1
        self.progress(file.size)

    def _verify(self, committed: list[WindowEntry]) -> None:
        """Every committed file has its size at the target."""
        there = self.target.sizes()
        wrong = [
            name for entry in committed for name, file in entry.files.items() if there.get(name) != file.size
        ]
        if wrong:
            raise DamagedCacheError(
                f"{len(wrong)} files did not arrive whole, such as {wrong[0]}; copy again, "
                "what is whole is kept"
            )
