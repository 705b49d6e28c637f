"""Files that are whole or absent: written beside, synced, renamed."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from google_crc32c import extend as add_to_crc32c

from .codec import Stored
from .errors import DamagedCacheError

BUFFER = 1 << 18
"""Bytes that are gathered for a write: many parts are small."""


def write_file(path: Path, data: Stored, writer: int = 0) -> None:
    """Put `data` at `path` in one step; after a crash the path holds the old file, the new one, or none.

    Processes that may write one path at the same time need different `writer` numbers.
    """
    write_parts(path, (data,), writer)


def write_parts(path: Path, parts: Iterable[Stored], writer: int = 0) -> tuple[int, str]:
    """As `write_file`, of parts that may be made while others are written, in memory that is used again.

    Returns bytes and checksum.
    """
    partial, size, check = partial_path(path, writer), 0, 0
    try:
        with open(partial, "wb", BUFFER) as file:
            for part in parts:
                file.write(part)
                size, check = size + len(part), _add(check, part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return size, f"{check:08x}"


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
