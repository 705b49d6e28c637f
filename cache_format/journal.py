"""The journal: what it lists exists, what it does not list does not.

One JSON object a line. First a header that names the manifest by its checksum, then one line for each
committed window, at last one line that says the cache is complete. Each line ends in its own crc32c, so a
flipped bit is found; a last line without its newline is the trace of a crash, and counts as not written.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DamagedCacheError
from .files import checksum
from .layout import JOURNAL, REJECTED, SAMPLES, SPLITS, log_name, window_files
from .manifest import MAX_DIMENSION, Manifest, parse_int, parse_str
from .strict_json import parse_json

_CHECK = ',"crc32c":"'
_FILE_NAME = re.compile(r"(train|val|stats)(/[a-z_]+){1,3}/c(\.\d+)+", re.ASCII)
MAX_FILE = 1 << 50


class FileEntry(NamedTuple):
    size: int
    """bytes"""
    crc32c: str
    """eight hex digits"""


class LogSizes(NamedTuple):
    """How much of the other two logs belongs to what is committed."""

    samples: FileEntry
    rejected: FileEntry


NO_LOGS = LogSizes(*[FileEntry(0, checksum(b""))] * 2)


@dataclass(frozen=True, kw_only=True)
class WindowEntry:
    split: str
    window: int
    tokens: int
    """At most the manifest's window; fewer in a writer's last one."""
    files: dict[str, FileEntry]
    """By path relative to the cache."""
    logs: LogSizes
    cursor: int
    """Where the producer has to start again to deliver what follows."""
    skip: int
    """Tokens after the cursor that are committed already."""


@dataclass
class Journal:
    """One writer's journal as read from disk."""

    path: Path
    windows: list[WindowEntry] = field(default_factory=list)
    manifest_crc32c: str | None = None
    final_logs: LogSizes | None = None
    """Set once the writer has finished."""
    lines: int = 0
    """Whole lines."""
    valid_bytes: int = 0
    """Length of the whole lines."""
    torn_bytes: int = 0
    """Length of an unfinished last line."""

    @property
    def complete(self) -> bool:
        return self.final_logs is not None

    @property
    def logs(self) -> LogSizes:
        if self.final_logs is not None:
            return self.final_logs
        return self.windows[-1].logs if self.windows else NO_LOGS


def header_line(manifest_text: str) -> bytes:
    return _line({"format": "clt", "manifest_crc32c": checksum(manifest_text.encode())})


def window_line(entry: WindowEntry) -> bytes:
    return _line(
        {
            "split": entry.split,
            "window": entry.window,
            "tokens": entry.tokens,
            "cursor": entry.cursor,
            "skip": entry.skip,
            SAMPLES: list(entry.logs.samples),
            REJECTED: list(entry.logs.rejected),
            "files": {name: list(file) for name, file in entry.files.items()},
        }
    )


def final_line(logs: LogSizes) -> bytes:
    return _line({"complete": True, SAMPLES: list(logs.samples), REJECTED: list(logs.rejected)})


def read_journal(folder: Path, rank: int) -> Journal:
    """Read one writer's journal; a missing file is an empty journal."""
    journal = Journal(folder / log_name(JOURNAL, rank))
    journal.windows = read_on(journal)
    return journal


def read_on(journal: Journal) -> list[WindowEntry]:
    """The windows that were added behind what was read of `journal`, which is then read to its end; nothing
    before it is read again. The caller decides whether they join `journal.windows`."""
    try:
        with open(journal.path, "rb") as file:
            file.seek(journal.valid_bytes)
            data = file.read()
    except FileNotFoundError:
        return []
    whole, newline, torn = data.rpartition(b"\n")
    journal.torn_bytes = len(torn)
    added: list[WindowEntry] = []
    for line in whole.split(b"\n") if newline else []:
        journal.lines += 1
        try:
            _take(journal, _parse_line(line), added)
        except ValueError as fault:
            raise DamagedCacheError(
                f"{journal.path}, line {journal.lines}: {fault}; restore the file from a copy"
            ) from fault
    journal.valid_bytes += len(data) - len(torn)
    return added


def was_cut(journal: Journal) -> bool:
    """Whether the file is shorter than what was read of it."""
    return journal.valid_bytes > 0 and journal.path.stat().st_size < journal.valid_bytes


def check_windows(journal: Journal, rank: int, manifest: Manifest) -> None:
    """The windows are numbered as this writer numbers them, are full but for each split's last, and have all
    their files; so nothing that is read later is larger than the files that were seen."""
    for split in SPLITS:
        entries = [entry for entry in journal.windows if entry.split == split]
        for nth, entry in enumerate(entries):
            where = f"{journal.path}, window {entry.window} of {split}"
            number = nth * manifest.world_size + rank
            if entry.window != number:
                raise DamagedCacheError(
                    f"{where}: expected window {number} there; restore the file from a copy"
                )
            last = nth == len(entries) - 1
            if entry.tokens > manifest.window or (entry.tokens < manifest.window and not last):
                raise DamagedCacheError(
                    f"{where}: expected {manifest.window} tokens, found {entry.tokens}; "
                    "restore the file from a copy"
                )
            names = window_files(split, number, manifest.n_layers, manifest.precision == "int8")
            if set(names) != entry.files.keys():
                odd = sorted(set(names) ^ entry.files.keys())
                raise DamagedCacheError(
                    f"{where}: {len(odd)} files are missing from its list or do not belong there, "
                    f"such as {odd[0]}; restore the file from a copy"
                )


def append(file_descriptor: int, line: bytes) -> None:
    """Add one line and make it durable: this is the commit. After an error the line is not there."""
    before = os.fstat(file_descriptor).st_size
    try:
        while line:
            line = line[os.write(file_descriptor, line) :]
        os.fsync(file_descriptor)
    except OSError:
        os.ftruncate(file_descriptor, before)
        raise


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"))[:-1]
    return f'{text}{_CHECK}{checksum(text.encode())}"}}\n'.encode()


def _parse_line(line: bytes) -> dict[str, Any]:
    text, mark, check = line.rpartition(_CHECK.encode())
    if not mark or check != f'{checksum(text)}"}}'.encode():
        raise DamagedCacheError("the line's crc32c does not match")
    content: dict[str, Any] = parse_json(text + b"}")
    return content


def _take(journal: Journal, content: dict[str, Any], added: list[WindowEntry]) -> None:
    if journal.lines == 1:
        journal.manifest_crc32c = parse_str(content.get("manifest_crc32c"), "manifest_crc32c")
    elif journal.complete:
        raise DamagedCacheError("expected nothing after the line that ends the journal")
    elif content.get("complete") is True:
        journal.final_logs = _parse_logs(content)
    else:
        added.append(_parse_window(content))


def _parse_window(content: dict[str, Any]) -> WindowEntry:
    split = parse_str(content.get("split"), "split")
    if split not in SPLITS:
        raise DamagedCacheError(f"split: expected one of {SPLITS}, found {split!r}")
    files = content.get("files")
    if not isinstance(files, dict):
        raise DamagedCacheError("files: expected an object")
    return WindowEntry(
        split=split,
        window=parse_int(content.get("window"), "window", 0, 2**40),
        tokens=parse_int(content.get("tokens"), "tokens", 1, MAX_DIMENSION),
        files={_parse_path(name): _parse_file(entry, name) for name, entry in files.items()},
        logs=_parse_logs(content),
        cursor=parse_int(content.get("cursor"), "cursor", 0, 2**62),
        skip=parse_int(content.get("skip"), "skip", 0, 2**62),
    )


def _parse_path(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise DamagedCacheError(f"files: {name!r} is no file of a cache")
    return name


def _parse_logs(content: dict[str, Any]) -> LogSizes:
    return LogSizes(*(_parse_file(content.get(name), name) for name in (SAMPLES, REJECTED)))


def _parse_file(data: object, name: str) -> FileEntry:
    if not isinstance(data, list) or len(data) != 2:
        raise DamagedCacheError(f"{name}: expected [bytes, crc32c], found {data!r}")
    return FileEntry(parse_int(data[0], name, 0, MAX_FILE), parse_str(data[1], name))
