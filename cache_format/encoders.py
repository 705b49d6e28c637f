"""A sealed window to its files: threads encode its layers and write them beside, then sync and place them."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..stopwatch import Stopwatch
from . import layout
from .codec import Stored, encode_chunk
from .files import FileBeside
from .journal import FileEntry
from .sealed import SealedWindow
from .stream import Stream

Written = dict[str, FileBeside]
"""By path, relative to the cache."""
Item = TypeVar("Item")
Done = TypeVar("Done")


class Encoders:
    """Threads of one writer."""

    def __init__(self, folder: Path, rank: int, threads: int, watch: Stopwatch) -> None:
        """watch: told the seconds of all threads: encode, write, sync."""
        self._folder, self._rank, self._watch = folder, rank, watch
        self._pool = ThreadPoolExecutor(threads, "clt-encode")

    def write(self, sealed: SealedWindow, stream: Stream) -> Written:
        """Write all files of the window, whose sums are added to those of its split, beside their places."""
        written: Written = {}
        with _discarded_on_failure(written):
            names = self._write_all(sealed, stream, written)
        return {name: written[name] for name in names}  # in one order, whoever was first

    def place(self, written: Written) -> dict[str, FileEntry]:
        """Make them durable, and put them in their places; their folders are not synced."""

        def place(file: FileBeside) -> None:
            with self._watch.measure("sync"):
                file.place()

        with _discarded_on_failure(written):
            self._each(place, written.values())
        return {name: FileEntry(file.size, file.crc32c) for name, file in written.items()}

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _write_all(self, sealed: SealedWindow, stream: Stream, written: Written) -> Iterator[str]:
        """Names in the journal's order."""
        stream.count += np.bincount(sealed.group, minlength=layout.N_GROUPS)

        def write(name: str, parts: Iterable[Stored]) -> str:
            with self._watch.measure("write"):
                written[name] = FileBeside(self._folder / name, self._encoded(parts), self._rank)
            return name

        def write_layer(place: tuple[str, int]) -> list[str]:
            site, index = place
            with self._watch.measure("encode"):
                return [write(*file) for file in sealed.layer_files(site, index, stream.sums[site])]

        def write_sum(file: tuple[str, npt.NDArray[Any]]) -> str:
            path, array = file
            return write(path, (encode_chunk(array),))

        tokens = [write(*file) for file in sealed.token_files()]
        layers = self._each(write_layer, sealed.window.places)
        sums = self._each(write_sum, stream.statistics(sealed.split, sealed.number))
        return chain(tokens, *layers, sums)

    def _each(self, work: Callable[[Item], Done], items: Iterable[Item]) -> list[Done]:
        """By the threads, none of which works on when this returns or raises."""
        jobs = [self._pool.submit(work, item) for item in items]
        try:
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)

    def _encoded(self, parts: Iterable[Stored]) -> Iterator[Stored]:
        """The same; the time to make them is not the disk's."""
        took, began = 0.0, time.perf_counter()
        for part in parts:
            took += time.perf_counter() - began
            yield part
            began = time.perf_counter()
        self._watch.count("encode", took + time.perf_counter() - began)


@contextmanager
def _discarded_on_failure(written: Written) -> Iterator[None]:
    try:
        yield
    except BaseException:
        discard(written)
        raise


def discard(written: Written) -> None:
    """Remove those that are not in their places."""
    for file in written.values():
        file.discard()
