"""Files that are whole or absent: written beside, synced, renamed."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from google_crc32c import extend as add_to_crc32c

from .codec import Parts
from .errors import DamagedCacheError


def write_file(path: Path, data: bytes | memoryview | Parts, writer: int = 0) -> None:
    """Put `data` at `path` in one step; after a crash the path holds the old file, the new one, or none.

    Processes that may write one path at the same time need different `writer` numbers.
    """
    partial = partial_path(path, writer)
    try:
        with open(partial, "wb") as file:
            for part in data if isinstance(data, tuple) else (data,):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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


def checksum(*data: bytes | memoryview) -> str:
    """crc32c of all parts together, in eight hex digits."""
    check = 0
    for part in data:
        check = add_to_crc32c(check, part if isinstance(part, bytes) else np.frombuffer(part, np.uint8))
    return f"{check:08x}"


def read_file(path: Path) -> bytes:
    """All bytes of a file that the cache must have."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedCacheError(f"{path} is missing; copy it again or harvest again") from None
