"""Is every byte of a cache what was written? Existence and sizes in seconds, `full` checks all bytes."""

from collections.abc import Callable, Iterator

import numpy as np

from . import layout
from .errors import CacheError
from .files import checksum, read_file
from .folder import extents_of
from .metadata import documents
from .reader import Cache, open_cache
from .shard import Shard
from .stored import missing_files

Progress = Callable[[int], None]


def verify_cache(path: str, full: bool = False, progress: Progress = lambda n: None) -> list[str]:
    """One line for each fault, naming the file; an empty list means that none was found.

    full: also read every file, compare its checksum with the journal's, and decode every chunk.
    progress is told how many committed files were done.
    """
    try:
        cache = open_cache(path, check=False)
        return [*_verify_logs(cache), *_verify_documents(cache), *_verify_files(cache, full, progress)]
    except CacheError as fault:
        return [str(fault)]


def n_files(path: str) -> int:
    """Committed files: the length of verify's progress bar."""
    cache = open_cache(path, check=False)
    return sum(len(entry.files) for journal in cache.journals for entry in journal.windows)


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
    extents = extents_of(cache.manifest, (entry for journal in cache.journals for entry in journal.windows))
    for name, expected in documents(cache.manifest, extents).items():
        try:
            if read_file(cache.path / name) != expected:
                yield f"{cache.path / name} is not the document that manifest and journal imply"
        except CacheError as fault:
            yield str(fault)


def _verify_files(cache: Cache, full: bool, progress: Progress) -> Iterator[str]:
    if not full:
        yield from missing_files(cache.path, cache.journals)
        yield from _verify_indexes(cache, progress)
        return
    for journal in cache.journals:
        for entry in journal.windows:
            for name, file in entry.files.items():
                progress(1)
                try:
                    data = read_file(cache.path / name)
                    if len(data) != file.size:
                        yield f"{name} has {len(data)} bytes, expected {file.size}"
                    elif checksum(data) != file.crc32c:
                        yield f"{name} was altered: its crc32c is {checksum(data)}, expected {file.crc32c}"
                    else:
                        _decode_all(cache, name, entry.tokens)
                except CacheError as fault:
                    yield str(fault)


def _verify_indexes(cache: Cache, progress: Progress) -> Iterator[str]:
    for journal in cache.journals:
        for entry in journal.windows:
            for name in entry.files:
                progress(1)
                if not _is_shard(name) or not (cache.path / name).exists():
                    continue
                try:
                    Shard(cache.path / name, cache.manifest.chunks_per_window)
                except CacheError as fault:
                    yield str(fault)


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
