"""A sealed window to its files: threads encode its layers and write them."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..stopwatch import Stopwatch
from . import layout
from .codec import Stored, encode_chunk
from .files import write_parts
from .journal import FileEntry
from .sealed import SealedWindow
from .stream import Stream


class Encoders:
    """Threads of one writer."""

    def __init__(self, folder: Path, rank: int, threads: int, watch: Stopwatch) -> None:
        """watch: told the seconds of all threads: encode, disk."""
        self._folder, self._rank, self._watch = folder, rank, watch
        self._pool = ThreadPoolExecutor(threads, "clt-encode")

    def write(self, sealed: SealedWindow, stream: Stream) -> dict[str, FileEntry]:
        """Write all files of the window, whose sums are added to those of its split."""
        return dict(self._write_all(sealed, stream))

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _write_all(self, sealed: SealedWindow, stream: Stream) -> Iterator[tuple[str, FileEntry]]:
        stream.count += np.bincount(sealed.group, minlength=layout.N_GROUPS)
        for file in sealed.token_files():
            yield self._write(file.path, file.parts)

        def write_layer(place: tuple[str, int]) -> list[tuple[str, FileEntry]]:
            site, index = place
            with self._watch.measure("encode"):
                files = sealed.layer_files(site, index, stream.sums[site])
                return [self._write(file.path, file.parts) for file in files]

        for entries in self._pool.map(write_layer, sealed.window.places):
            yield from entries
        for path, array in stream.statistics(sealed.split, sealed.number):
            yield self._write(path, (encode_chunk(array),))

    def _write(self, name: str, parts: Iterable[Stored]) -> tuple[str, FileEntry]:
        with self._watch.measure("disk"):
            written = write_parts(self._folder / name, self._encoded(parts), self._rank)
        return name, FileEntry(*written)

    def _encoded(self, parts: Iterable[Stored]) -> Iterator[Stored]:
        """The same; the time to make them is not the disk's."""
        took, began = 0.0, time.perf_counter()
        for part in parts:
            took += time.perf_counter() - began
            yield part
            began = time.perf_counter()
        self._watch.count("encode", took + time.perf_counter() - began)
