"""Files that are whole or absent: written beside, synced, renamed."""

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from google_crc32c import extend as add_to_crc32c

from .codec import Bytes, Stored
from .errors import DamagedCacheError

BUFFER = 1 << 18
"""Bytes that are gathered for a write: many parts are small. Their memory begins where a page does, as the
system's does: AMD's processors with `fsrm` copy at a sixth of their speed where the target's place in its
page is less than 32 bytes behind the source's."""

_LOCAL = threading.local()


def write_file(path: Path, data: Stored, writer: int = 0) -> None:
    """Put `data` at `path` in one step; after a crash the path holds the old file, the new one, or none.

    Processes that may write one path at the same time need different `writer` numbers.
    """
    FileBeside(path, (data,), writer).place()


class FileBeside:
    """All bytes of a file, written beside its place, not durable yet; to be placed or discarded."""

    def __init__(self, path: Path, parts: Iterable[Stored], writer: int = 0) -> None:
        """parts: may be made while others are written, in memory that is used again."""
        self._path, self._partial = path, partial_path(path, writer)
        self.size, check = 0, 0
        try:
            with open(self._partial, "wb", 0) as file, _buffer() as buffer:
                for part in parts:
                    self._fill(buffer, part, file)
                    self.size, check = self.size + len(part), _add(check, part)
                _write_all(file, buffer[: self.size % BUFFER])
                _send_on(file)
                self._descriptor = os.dup(file.fileno())  # open on: an error of a later write shows in fsync
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        self.crc32c = f"{check:08x}"

    def _fill(self, buffer: Bytes, part: Stored, file: IO[bytes]) -> None:
        """Write the buffer each time that it is full."""
        data, done = np.frombuffer(part, np.uint8), 0
        while done < len(data):
            start = (self.size + done) % BUFFER
            some = data[done : done + BUFFER - start]
            buffer[start : start + len(some)] = some
            done += len(some)
            if start + len(some) == BUFFER:
                _write_all(file, buffer)

    def place(self) -> None:
        """Make it durable, and put it in its place; its folder is not synced."""
        try:
            os.fsync(self._descriptor)
            os.replace(self._partial, self._path)
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        finally:
            self._close()

    def discard(self) -> None:
        """Remove it, where it was not placed."""
        if self._descriptor >= 0:
            self._close()
            self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


@contextmanager
def _buffer() -> Iterator[Bytes]:
    """This thread's, for new memory is slow."""
    buffer = _LOCAL.__dict__.pop("buffer", None)
    if buffer is None:
        buffer = np.frombuffer(mmap.mmap(-1, BUFFER), np.uint8)
    yield buffer
    _LOCAL.buffer = buffer


def _write_all(file: IO[bytes], data: Bytes) -> None:
    while len(data):
        data = data[file.write(data.data) :]


def _send_on(file: IO[bytes]) -> None:
    """Have the disk begin with what was written, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def partial_path(path: Path, writer: int = 0) -> Path:
    """Where `write_file` prepares a file; one that is found there was left by a crash."""
    return path.with_name(f".{path.name}.{writer}.partial")


def sync_folders(folders: Iterable[Path]) -> None:
    """Make renames inside `folders` durable."""
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(data: Stored) -> str:
    """crc32c, in eight hex digits."""
    return f"{_add(0, data):08x}"


def _add(check: int, part: Stored) -> int:
    found: int = add_to_crc32c(check, part if isinstance(part, bytes) else np.frombuffer(part, np.uint8))
    return found


def read_file(path: Path) -> bytes:
    """All bytes of a file that the cache must have."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedCacheError(f"{path} is missing; copy it again or harvest again") from None
