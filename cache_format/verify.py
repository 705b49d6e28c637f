"""Is every byte of a cache what was written? Existence and sizes in seconds, `full` checks all bytes."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import layout
from .errors import CacheError
from .files import checksum, read_file
from .folder import extents_of
from .journal import FileEntry, WindowEntry
from .metadata import documents
from .reader import Cache, open_cache
from .shard import Shard, index_bytes, parse_index
from .stored import size_fault

Progress = Callable[[int], None]
THREADS = 4
BATCH = 16
"""Files that a thread takes at a time."""


class _Job(NamedTuple):
    tokens: int
    """of the window"""
    files: list[tuple[str, FileEntry]]


def verify_cache(
    cache: Cache | str | Path, full: bool = False, progress: Progress = lambda n: None
) -> list[str]:
    """One line for each fault, naming the file; an empty list means that none was found.

    cache: its folder, or what `open_cache(folder, check=False)` gave. full: also read every file, compare its
    checksum with the journal's, and decode every chunk; memory: the largest file, times THREADS. progress is
    told how many more committed files were done.
    """
    try:
        cache = cache if isinstance(cache, Cache) else open_cache(cache, check=False)
        return [*_verify_logs(cache), *_verify_documents(cache), *_verify_files(cache, full, progress)]
    except CacheError as fault:
        return [str(fault)]


def _verify_logs(cache: Cache) -> Iterator[str]:
    for journal in cache.journals:
        if journal.torn_bytes:
            yield (
                f"{journal.path} ends in {journal.torn_bytes} bytes that are no line: a harvest was cut off "
                "there (run it again to go on), or the file was altered"
            )
        elif journal.manifest_crc32c is None:
            yield f"{journal.path} is missing or empty: this writer has not begun"
    for read in (cache.samples, cache.rejected):
        try:
            read()
        except CacheError as fault:
            yield str(fault)
    for rank, journal in enumerate(cache.journals):
        for log, (size, _) in zip((layout.SAMPLES, layout.REJECTED), journal.logs, strict=True):
            path = cache.path / layout.log_name(log, rank)
            if not journal.complete or (size and not path.exists()):
                continue  # more may come, or the missing file was named above
            if not path.exists():
                yield f"{path} is missing; expected an empty file"
            elif path.stat().st_size != size:
                yield f"{path} has {path.stat().st_size} bytes, expected {size}"


def _verify_documents(cache: Cache) -> Iterator[str]:
    extents = extents_of(cache.manifest, cache.windows)
    for name, expected in documents(cache.manifest, extents).items():
        try:
            if read_file(cache.path / name) != expected:
                yield f"{cache.path / name} is not the document that manifest and journal imply"
        except CacheError as fault:
            yield str(fault)


def _verify_files(cache: Cache, full: bool, progress: Progress) -> Iterator[str]:
    verify = _verify_bytes if full else _verify_index
    jobs = [_Job(entry.tokens, files) for entry in cache.windows for files in _batches(entry)]

    def work(job: _Job) -> list[str]:
        faults = (verify(cache, name, file, job.tokens) for name, file in job.files)
        return [fault for fault in faults if fault]

    pool = ThreadPoolExecutor(THREADS)
    try:
        for job, faults in zip(jobs, pool.map(work, jobs), strict=True):
            yield from faults
            progress(len(job.files))
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(entry: WindowEntry) -> Iterator[list[tuple[str, FileEntry]]]:
    files = list(entry.files.items())
    for start in range(0, len(files), BATCH):
        yield files[start : start + BATCH]


def _verify_index(cache: Cache, name: str, file: FileEntry, tokens: int) -> str | None:
    """Size, and of a shard its index: one open and one read."""
    path = f"{cache.path}/{name}"
    fault = size_fault(path, name, file.size)
    if fault or not _is_shard(name):
        return fault
    length = index_bytes(cache.manifest.chunks_per_window)
    if file.size < length:
        return f"{name} is cut short: {file.size} bytes cannot hold its index"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parse_index(os.pread(descriptor, length, file.size - length), file.size - length)
    except CacheError as damage:
        return f"{name}: {damage}; copy the file again"
    finally:
        os.close(descriptor)
    return None


def _verify_bytes(cache: Cache, name: str, file: FileEntry, tokens: int) -> str | None:
    try:
        data = read_file(cache.path / name)
        if len(data) != file.size:
            return f"{name} has {len(data)} bytes, expected {file.size}"
        if checksum(data) != file.crc32c:
            return f"{name} was altered: its crc32c is {checksum(data)}, expected {file.crc32c}"
        _decode_all(cache, name, tokens)
    except CacheError as fault:
        return str(fault)
    return None


def _decode_all(cache: Cache, name: str, tokens: int) -> None:
    """Decode every chunk of a shard; other files are one checked chunk already."""
    if not _is_shard(name):
        return
    manifest = cache.manifest
    if "_scale/" in name:
        out = np.empty((layout.CHUNK, manifest.n_blocks), np.float16)
    else:
        dtype = np.int8 if manifest.precision == "int8" else np.uint16
        out = np.empty((layout.CHUNK, manifest.d_model), dtype)
    shard = Shard(cache.path / name, manifest.chunks_per_window)
    for slot in range(layout.n_chunks(tokens)):
        shard.decode(slot, out)


def _is_shard(name: str) -> bool:
    return not name.startswith("stats/") and "/token/" not in name
