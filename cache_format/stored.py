"""What lies in a cache's folder, read back and checked, piece by piece.

Nothing here allocates more than the files that it reads can hold.
"""

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout
from .codec import decode_chunk
from .errors import CacheError, DamagedCacheError
from .files import checksum, read_file
from .journal import FileEntry, WindowEntry
from .manifest import Manifest, parse_manifest
from .metadata import ROOT
from .statistics import SiteSums
from .strict_json import parse_json

LOOKS_AT_ONCE = 8
"""Threads that look at files: on a network file system each look waits for an answer."""
MAX_RATIO = 1 << 16
"""Decoded bytes for one stored byte: zstd's best is a block of 128 KiB in four bytes."""


def missing_files(
    folder: Path, windows: Iterable[WindowEntry], progress: Callable[[int], None] = lambda n: None
) -> list[str]:
    """One line for each committed file that is absent or has another size; progress is told how many more
    were looked at."""

    def look(entry: WindowEntry) -> list[str]:
        faults = (size_fault(f"{folder}/{name}", name, file.size) for name, file in entry.files.items())
        return [fault for fault in faults if fault]

    faults = []
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        windows = list(windows)
        for entry, found in zip(windows, pool.map(look, windows), strict=True):
            faults += found
            progress(len(entry.files))
    return faults


def size_fault(path: str, name: str, size: int) -> str | None:
    """Why the file `name` at `path` is not one of `size` bytes."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is no file"
    return f"{name} has {status.st_size} bytes, expected {size}" if status.st_size != size else None


def read_manifest(folder: Path) -> Manifest:
    """The manifest, from the root's attributes; CacheError where there is none that this version reads."""
    path = folder / ROOT
    if not path.is_file():
        raise CacheError(
            f"{folder} is no cache: expected a file {ROOT} in it, found none; "
            "name a folder that `clt harvest` wrote"
        )
    try:
        attribute = parse_json(path.read_bytes())["attributes"]["clt"]
    except (ValueError, KeyError, TypeError) as fault:
        raise CacheError(f"{path} does not describe a cache of clt ({fault!r}); copy it again") from fault
    try:
        return parse_manifest(attribute)
    except CacheError as fault:
        raise CacheError(f"{path}: {fault}") from fault


def read_log(path: Path, committed: FileEntry) -> tuple[bytes, list[dict[str, Any]]]:
    """The committed part of samples.jsonl or rejected.jsonl: its bytes, and its lines."""
    data = read_file(path)[: committed.size] if committed.size else b""
    if len(data) != committed.size or checksum(data) != committed.crc32c:
        raise DamagedCacheError(f"{path} is not what the journal committed; restore it from a copy")
    lines = []
    for number, text in enumerate(data.splitlines(), start=1):
        try:
            line = parse_json(text)
            if type(line["sample"]) is not int:
                raise ValueError("sample: expected an integer")
        except (ValueError, KeyError, TypeError) as fault:
            raise DamagedCacheError(
                f"{path}, line {number}: expected an object with a sample number ({fault!r}); harvest again"
            ) from fault
        lines.append(line)
    return data, lines


def read_site_sums(
    folder: Path, manifest: Manifest, split: str, window: int
) -> tuple[dict[str, SiteSums], npt.NDArray[np.int64]]:
    """Sums over all windows of one writer up to and including `window`, and tokens by group."""
    per_layer = (layout.N_GROUPS, manifest.n_layers)
    sums = {}
    for site in layout.SITES:
        arrays = []
        for statistic in layout.STATISTICS:
            shape = per_layer + (manifest.d_model,) * (statistic == "sum")
            array = layout.statistic_array(split, site, statistic)
            path = layout.window_file(array, window, 1 + len(shape))
            arrays.append(read_array(folder, path, shape, np.dtype("<f8")))
        sums[site] = SiteSums(*arrays)
    path = layout.window_file(layout.count_array(split), window, 2)
    return sums, read_array(folder, path, (layout.N_GROUPS,), np.dtype("<i8"))


def read_array(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The array in a file that is one chunk."""
    path = folder / name
    stored = read_file(path)
    nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if nbytes > MAX_RATIO * len(stored):
        raise DamagedCacheError(f"{path}: {len(stored)} bytes cannot hold {nbytes}; copy it again")
    out = np.empty(shape, dtype)
    try:
        decode_chunk(memoryview(stored), out)
    except DamagedCacheError as fault:
        raise DamagedCacheError(f"{path}: {fault}; copy it again") from fault
    return out
