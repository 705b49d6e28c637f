"""Writing a cache: samples in, committed windows out, resumable at every window.

    writer = CacheWriter(folder, manifest)
    for each sample of a split, from writer.cursor(split) on:
        writer.add(split, cursor, sample, columns, values)
    writer.finish()

A full window is encoded and written by threads while the next one fills, and synced while that one is
encoded; its journal line, written after all its files are durable, is the commit. A killed process therefore
loses at most the windows that were being filled, and one that was not synced yet. Adding again from the
cursor writes, byte for byte, what would have been written without it.

Memory: `window.memory` states the bound, three windows and a few chunks a thread; FORMAT.md explains it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ..stopwatch import Stopwatch
from . import layout
from .commits import Commits
from .encoders import Encoders, Written
from .errors import CacheError
from .files import checksum, sync_folders
from .folder import Documents, claim_folder, lock, write_root
from .journal import (
    NO_LOGS,
    Journal,
    LogSizes,
    WindowEntry,
    append,
    check_windows,
    final_line,
    header_line,
    read_journal,
    window_line,
)
from .manifest import Manifest
from .sample_log import SampleLog
from .sealed import SealedWindow
from .stream import Stream
from .window import Columns, Quantisers, Values, Window


class CacheWriter:
    """One process's hand on a cache; `max_tokens` bounds split train (of this rank)."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        rank: int = 0,
        threads: int = 2,
        max_tokens: int | None = None,
        after_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """after_commit: called by the committing thread; while it waits, the next window does."""
        self._after_commit = after_commit
        self.folder, self.manifest, self.rank, self.max_tokens = folder, manifest, rank, max_tokens
        self.bytes_written = 0
        self.committed_here = 0
        """Bytes of the files, and tokens, that this process committed."""
        self.watch = Stopwatch()
        """Seconds of all threads: quantise, encode, write, sync; the caller's: wait encoded, wait synced."""
        self._failed = False
        claim_folder(folder, manifest)
        self._journal_fd = lock(folder / layout.log_name(layout.JOURNAL, rank))
        try:
            write_root(folder, manifest, rank)
            journal = read_journal(folder, rank)
            check_windows(journal, rank, manifest)
            self.complete = journal.complete
            self._samples = SampleLog(folder / layout.log_name(layout.SAMPLES, rank), journal.logs.samples)
            self._rejected = SampleLog(folder / layout.log_name(layout.REJECTED, rank), journal.logs.rejected)
            sync_folders([folder])
            self._resume_journal(journal)
            self._streams = {
                split: Stream.restored(folder, manifest, [e for e in journal.windows if e.split == split])
                for split in layout.SPLITS
            }
            self._documents = Documents(folder, manifest, rank)
            self._documents.refresh()
        except BaseException:
            self._unlock()
            raise
        self._encoders = Encoders(folder, rank, threads, self.watch)
        self._quantisers = Quantisers(threads)
        self._commits = Commits(self.watch)
        self._free: list[Window] = []

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cursor(self, split: str) -> int:
        """Where the producer must start again in this split."""
        return self._streams[split].cursor

    def committed(self, split: str) -> int:
        """Tokens that are safe on disk (of this rank)."""
        return self._streams[split].committed

    @property
    def has_tokens(self) -> bool:
        """Something is committed or waits in a window."""
        return any(stream.added for stream in self._streams.values())

    def added(self, split: str) -> int:
        """Tokens taken in, committed or not (of this rank)."""
        return self._streams[split].added

    def to_skip(self, split: str) -> int:
        """Tokens from the cursor on that are committed already."""
        return self._streams[split].to_skip

    def skippable(self, split: str, cursor: int, tokens: int) -> bool:
        """Whether the next `tokens` tokens are committed already; if so, counts them as added."""
        stream = self._streams[split]
        stream.at_cursor(cursor)
        return 0 < tokens <= stream.to_skip and stream.skip(tokens) == tokens

    @property
    def full(self) -> bool:
        """No more tokens of split train are wanted."""
        return self.max_tokens is not None and self._streams["train"].added >= self.max_tokens

    def add(self, split: str, cursor: int, sample: dict[str, Any], columns: Columns, values: Values) -> None:
        """Store one sample's tokens.

        sample: the line for samples.jsonl; its "sample" is the number that columns["sample"] repeats.
        columns: 1-d arrays by name (all but "sink"). values[site]: (token, layer, d_model) float32, or uint16
        bf16 bits, or StoredVectors; fastest as a view of (layer, token, d_model). Raises CacheError where
        values cannot be represented, naming the sample.
        """
        self._check_sound()
        stream = self._streams[split]
        self._samples.add(sample["sample"], sample)
        stream.at_cursor(cursor)
        length = len(columns["sample"])
        start = stream.skip(length)
        if split == "train" and self.max_tokens is not None:
            length = min(length, start + max(0, self.max_tokens - stream.added))
        while start < length:
            unused = self._free.pop() if not stream.filling and self._free else None
            window = stream.filling = stream.filling or unused or Window(self.manifest)
            stop = min(length, start + window.room)
            piece = slice(start, stop)
            try:
                with self.watch.measure("quantise"):
                    window.append(
                        {name: column[piece] for name, column in columns.items()},
                        {site: value[piece] for site, value in values.items()},
                        self._quantisers,
                    )
            except CacheError as fault:
                raise CacheError(f"sample {sample.get('id', sample['sample'])!r}, {fault}") from fault
            stream.since_cursor += stop - start
            start = stop
            if not window.room:
                self._seal(split)

    def reject(self, sample: int, line: dict[str, Any]) -> None:
        """Record a sample that is left out, with its reason."""
        self._rejected.add(sample, line)

    @property
    def rejected(self) -> set[int]:
        return self._rejected.known

    def flush(self) -> None:
        """Wait until every full window is committed."""
        self._check_sound()
        with self._failing():
            self._commits.wait()

    def wait_encoded(self) -> None:
        """Wait until no full window has more to wait for than the disk, which leaves the processors free."""
        self._check_sound()
        with self._failing():
            self._commits.wait_encoded()

    def finish(self) -> None:
        """Commit what is left as shorter windows, and mark this writer's part as complete."""
        if self.complete:
            return
        for split in layout.SPLITS:
            if self._streams[split].filling is not None:
                self._seal(split)
        self.flush()
        with self._failing():
            append(self._journal_fd, final_line(self._commit_logs(*self._take_waiting())))
        self.complete = True
        self._documents.refresh()

    def close(self) -> None:
        """Stop after the windows that are full; what fills a window is left to the next run."""
        try:
            if not self._failed:
                self.flush()
                if not self.complete:
                    self._rejected.show_waiting()
        finally:
            self._commits.shutdown()
            self._encoders.shutdown()
            self._quantisers.shutdown()
            self._unlock()

    def _unlock(self) -> None:
        descriptor, self._journal_fd = self._journal_fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What follows a failure must not be committed behind a gap."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _check_sound(self) -> None:
        if self._failed:
            raise CacheError(
                f"{self.folder}: a window could not be written; expected this writer to be closed. "
                "Run the harvest again, it goes on from the last committed window"
            )

    def _seal(self, split: str) -> None:
        """Have the full window encoded and committed."""
        stream = self._streams[split]
        window, stream.filling = stream.filling, None
        assert window is not None
        self._check_sound()
        number = stream.windows * self.manifest.world_size + self.rank
        stream.windows += 1
        stream.sealed += window.tokens
        entry = WindowEntry(
            split=split,
            window=number,
            tokens=window.tokens,
            files={},
            logs=NO_LOGS,
            cursor=stream.cursor,
            skip=stream.since_cursor,
        )
        with self._failing():
            self._commits.put(
                partial(self._encode, entry, window), partial(self._commit, entry, self._take_waiting())
            )

    def _take_waiting(self) -> tuple[bytes, bytes]:
        return self._samples.take(), self._rejected.take()

    def _encode(self, entry: WindowEntry, window: Window) -> Written:
        split, number = entry.split, entry.window
        written = self._encoders.write(SealedWindow(window, split, number), self._streams[split])
        self._free.append(window.clear())
        return written

    def _commit(self, entry: WindowEntry, lines: tuple[bytes, bytes], written: Written) -> None:
        """entry: without its files and logs."""
        files = self._encoders.place(written)
        folders = {(self.folder / name).parent for name in files}
        with self.watch.measure("sync"):
            sync_folders(sorted(folders))
            logs = self._commit_logs(*lines)
        append(self._journal_fd, window_line(replace(entry, files=files, logs=logs)))
        self.bytes_written += sum(file.size for file in files.values())
        self.committed_here += entry.tokens
        self._streams[entry.split].committed += entry.tokens
        self._documents.refresh()
        self._after_commit()

    def _commit_logs(self, samples: bytes, rejected: bytes) -> LogSizes:
        return LogSizes(self._samples.commit(samples), self._rejected.commit(rejected))

    def _resume_journal(self, journal: Journal) -> None:
        """Begin the journal, or drop what a crash left behind its last line."""
        text = self.manifest.canonical().encode()
        if journal.manifest_crc32c is None:
            os.ftruncate(self._journal_fd, 0)
            append(self._journal_fd, header_line(text.decode()))
        elif journal.manifest_crc32c != checksum(text):
            raise CacheError(f"{journal.path} was begun under another manifest; harvest into a new folder")
        else:
            os.ftruncate(self._journal_fd, journal.valid_bytes)
