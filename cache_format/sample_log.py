"""A .jsonl beside the journal: one line a sample, written with the window that first holds its tokens."""

import json
import os
from pathlib import Path
from typing import Any

from google_crc32c import extend

from .journal import FileEntry
from .stored import read_log


class SampleLog:
    """samples.jsonl or rejected.jsonl of one writer, as far as it was committed.

    What a crash left behind that is ignored, and overwritten by the next commit.
    """

    def __init__(self, path: Path, committed: FileEntry) -> None:
        self.path = path
        if not committed.size:
            path.touch()
        data, lines = read_log(path, committed)
        self.known = {line["sample"] for line in lines}
        """Samples that have a line already."""
        self._size, self._crc = len(data), int(committed.crc32c, 16)
        self._waiting = bytearray()

    def add(self, sample: int, line: dict[str, Any]) -> None:
        """Keep a line for the next commit, unless the sample has one."""
        if sample not in self.known:
            self.known.add(sample)
            self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def take(self) -> bytes:
        """The lines that wait; the caller commits them."""
        lines = bytes(self._waiting)
        self._waiting.clear()
        return lines

    def show_waiting(self) -> None:
        """Let people read the lines that wait; the next commit overwrites them."""
        with open(self.path, "r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(self._waiting)

    def commit(self, lines: bytes) -> FileEntry:
        """Write lines behind what is committed, over whatever a crash left there."""
        with open(self.path, "r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(lines)
        self._crc = extend(self._crc, lines)
        return FileEntry(self._size, f"{self._crc:08x}")
