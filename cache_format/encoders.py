"""A sealed window to its files: threads encode its layers and write them beside, then sync and place them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from ..spare_time import use_spare_time
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

PATIENCE = 0.05
"""Seconds after which who waits for threads that have spare time only does some of their work: where others
keep the processor busy, there may be none."""


class Encoders:
    """Threads of one writer."""

    def __init__(self, folder: Path, rank: int, threads: int, watch: Stopwatch, spare: bool = False) -> None:
        """watch: told the seconds of all threads: encode, write, sync. spare: as the writer has it."""
        self._folder, self._rank, self._watch = folder, rank, watch
        self._threads, self._spare = threads, spare
        self._pool = ThreadPoolExecutor(threads, "clt-encode", use_spare_time if spare else None)
        self._jobs: Jobs[Any, Any] = Jobs(lambda item: item, ())

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

    def wait_for(self, done: Future[Any]) -> None:
        """Until that part of a window's way is done; raises what stopped it."""
        while self._spare and not wait([done], PATIENCE).done:
            self._jobs.work_off()
        done.result()

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

        tokens = [write(*file) for file in sealed.token_files()]
        layers = self._each(write_layer, sealed.window.places)
        sums = [
            write(path, (encode_chunk(array),))
            for path, array in stream.statistics(sealed.split, sealed.number)
        ]
        return chain(tokens, *layers, sums)

    def _each(self, work: Callable[[Item], Done], items: Iterable[Item]) -> list[Done]:
        """By the threads, none of which works on when this returns or raises."""
        self._jobs = jobs = Jobs(work, items)
        for _ in range(self._threads):
            self._pool.submit(jobs.work_off)
        return jobs.results()

    def _encoded(self, parts: Iterable[Stored]) -> Iterator[Stored]:
        """The same; the time to make them is not the disk's."""
        took, began = 0.0, time.perf_counter()
        for part in parts:
            took += time.perf_counter() - began
            yield part
            began = time.perf_counter()
        self._watch.count("encode", took + time.perf_counter() - began)


class Jobs(Generic[Item, Done]):
    """Work that is shared by whoever calls `work_off`, in order."""

    def __init__(self, work: Callable[[Item], Done], items: Iterable[Item]) -> None:
        self._work = work
        self._waiting: deque[tuple[Item, Future[Done]]] = deque((item, Future()) for item in items)
        self._all = [done for _, done in self._waiting]

    def work_off(self) -> None:
        """Do what nobody has begun yet."""
        while job := self._next():
            item, done = job
            try:
                done.set_result(self._work(item))
            except BaseException as fault:
                done.set_exception(fault)

    def results(self) -> list[Done]:
        """Of all, once nobody is at work; where one failed, what was not begun is left."""
        try:
            return [done.result() for done in self._all]
        finally:
            while job := self._next():
                job[1].cancel()
                job[1].set_running_or_notify_cancel()  # or `wait` takes it for one that is to come
            wait(self._all)

    def _next(self) -> tuple[Item, Future[Done]] | None:
        with suppress(IndexError):
            return self._waiting.popleft()
        return None


@contextmanager
def _discarded_on_failure(written: Written) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for file in written.values():
            file.discard()
        raise
