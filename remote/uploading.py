"""A harvest to a store: committed windows go up while the next ones are computed, and leave the disk after.

The store's cache keeps the commit rule: a window's files go first, then the logs, then the journal with its
line. The local folder stays a writer's folder, without the files that are up; where there is none (another
machine goes on), it is made from the store's journal, logs and last statistics.
"""

import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..cache_format import CacheError, DamagedCacheError, layout
from ..cache_format.folder import extents_of
from ..cache_format.journal import Journal, WindowEntry, read_on
from ..cache_format.metadata import ROOT, documents
from ..cache_format.stored import read_manifest
from .copying import THREADS, Folder, open_from
from .store import FileCheck, MissingError, Store

LOOK_EVERY = 0.2
"""Seconds between looks at the journal."""


class Upload:
    """One writer's way to a store; bound: bytes of committed windows that may wait on the disk.

    Within its context windows go up by a thread of their own; what that thread raises, `wait_for_room` and
    `finish` raise.
    """

    def __init__(self, address: str, folder: Path, rank: int, bound: int, threads: int = THREADS) -> None:
        self.store, self.folder, self.rank, self.bound = Store(address), folder, rank, bound
        self.store.require_writable()
        self._threads = threads
        self._path = folder / layout.log_name(layout.JOURNAL, rank)
        self._journal = Journal(self._path)
        self._waiting: list[WindowEntry] = []
        self._done = 0
        """Windows that are up"""
        self._fault: BaseException | None = None
        self._wake, self._stop = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="clt-upload", daemon=True)

    def __enter__(self) -> "Upload":
        self._done = self._meet()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_room(self) -> None:
        """Until what waits to go up is within the bound; called after each commit."""
        with self._wake:
            while self._fault is None and self._bytes_waiting() > self.bound:
                self._wake.wait(LOOK_EVERY)
        self._raise()

    def finish(self) -> None:
        """Send what is left, the journal's last line and the documents; check that every file is there."""
        self._stop.set()
        self._thread.join()
        self._raise()
        self._look()
        self._send_all()
        self._commit(self._path.read_bytes())
        self._describe_last()
        there = self.store.sizes()
        files = ((name, file) for entry in read_on(Journal(self._path)) for name, file in entry.files.items())
        wrong = [name for name, file in files if there.get(name) != file.size]
        if wrong:
            raise DamagedCacheError(f"{self.store.address}: {len(wrong)} files are not there, as {wrong[0]}")

    def _meet(self) -> int:
        """Bring folder and store together; how many windows are up already."""
        name = layout.log_name(layout.JOURNAL, self.rank)
        try:
            with tempfile.TemporaryDirectory() as into:
                far = open_from(self.store, Path(into))
                text = (Path(into) / name).read_bytes() if (Path(into) / name).exists() else b""
        except MissingError:
            return 0
        if self._path.exists() and read_manifest(self.folder).differences(far.manifest):
            raise CacheError(f"{self.folder} belongs to another cache than {self.store.address}; empty it")
        here = self._path.read_bytes() if self._path.exists() else b""
        if not here.startswith(text):
            if not text.startswith(here):
                raise CacheError(
                    f"{self.folder} and {self.store.address} went different ways; empty the folder to go on "
                    "from the store"
                )
            self._restore(text, far.journals[self.rank])
        return len(far.journals[self.rank].windows) if self.rank < len(far.journals) else 0

    def _restore(self, text: bytes, journal: Journal) -> None:
        """Make the folder what a writer goes on from."""
        here = Folder(self.folder)
        here.put(ROOT, self.store.get(ROOT))
        for split in layout.SPLITS:
            for entry in [entry for entry in journal.windows if entry.split == split][-1:]:
                for name in (name for name in entry.files if name.startswith("stats/")):
                    here.put(name, self.store.get(name, FileCheck(entry.files[name])))
        for log, committed in zip((layout.SAMPLES, layout.REJECTED), journal.logs, strict=True):
            name = layout.log_name(log, self.rank)
            here.put(name, self.store.get(name)[: committed.size] if committed.size else b"")
        here.put(layout.log_name(layout.JOURNAL, self.rank), text)

    def _work(self) -> None:
        try:
            while not self._stop.wait(LOOK_EVERY):
                self._look()
                self._send_all()
        except BaseException as fault:  # told by wait_for_room and finish
            self._fault = fault
        with self._wake:
            self._wake.notify_all()

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _bytes_waiting(self) -> int:
        self._look()
        return sum(file.size for entry in self._waiting for file in entry.files.values())

    def _look(self) -> None:
        """Take what the journal has got."""
        with self._wake:
            before = len(self._journal.windows)
            self._journal.windows += read_on(self._journal)
            self._waiting += self._journal.windows[max(before, self._done) :]

    def _send_all(self) -> None:
        while self._waiting:
            self._send(self._waiting[0])
            with self._wake:
                self._waiting.pop(0)
                self._done += 1
                self._wake.notify_all()

    def _send(self, entry: WindowEntry) -> None:
        """One window: files, logs, journal, documents; then its room is free."""
        here = Folder(self.folder)

        def send(name: str) -> None:
            self.store.put(name, here.get(name, FileCheck(entry.files[name])))

        if not self._done:
            self.store.put(ROOT, here.get(ROOT))
        with ThreadPoolExecutor(self._threads, "clt-upload") as pool:
            list(pool.map(send, entry.files))
        for log, committed in zip((layout.SAMPLES, layout.REJECTED), entry.logs, strict=True):
            name = layout.log_name(log, self.rank)
            self.store.put(name, here.get(name)[: committed.size])
        lines = self._path.read_bytes().splitlines(keepends=True)
        self._commit(b"".join(lines[: self._done + 2]))  # the header, those before, this one
        self._describe()
        self._free(entry)

    def _commit(self, text: bytes) -> None:
        self.store.put(layout.log_name(layout.JOURNAL, self.rank), text)

    def _describe(self) -> bytes:
        """Put Zarr's documents, of what all writers have sent; all of them as one text."""
        with tempfile.TemporaryDirectory() as into:
            far = open_from(self.store, Path(into))
        found = documents(far.manifest, extents_of(far.manifest, far.windows))
        for name, data in found.items():
            self.store.put(name, data)
        return b"".join(found.values())

    def _describe_last(self) -> None:
        """Until nothing was committed while the documents were put: of two writers that end at the same time
        the slower one would leave what it knew before."""
        before, now = None, self._describe()
        while now != before and read_manifest(self.folder).world_size > 1:
            before, now = now, self._describe()

    def _free(self, entry: WindowEntry) -> None:
        """Delete what is up; a writer that goes on needs the last statistics of each split."""
        earlier = [e for e in self._journal.windows[: self._done] if e.split == entry.split]
        self._delete(name for name in entry.files if not name.startswith("stats/"))
        self._delete(name for e in earlier[-1:] for name in e.files if name.startswith("stats/"))

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
