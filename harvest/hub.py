"""Rows from the library `datasets`: parquet files and saved folders by number, hub names as a stream."""

import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..cache_format.permutation import permutation
from .rows import HEAD, ORDER, Numbered, Row, Rows, Table

BLOCK = 1024
"""Rows of a stream that are shuffled together; they are in memory at once."""
LOOKED_INTO, PIECES, PIECE = 1000, 256, 1 << 16
"""For a fingerprint: files, places of each, and bytes at each place."""


class Stream:
    """Rows that come one after the other, over the network; nothing but what is read is downloaded.

    They are shuffled within blocks of BLOCK rows, for a stream has no other end than its own.
    """

    def __init__(self, rows: Any, fingerprint: str) -> None:
        self._rows, self.fingerprint = rows, fingerprint
        self.folder: Path | None = None

    def walk(self, seed: int, start: int, step: int) -> Iterator[Numbered]:
        first, number = start - start % BLOCK, start
        rows = iter(self._rows.skip(first) if first else self._rows)
        while block := list(islice(rows, BLOCK)):
            order = permutation(len(block), seed, ORDER, first)
            while number < first + len(block):
                row = int(order[number - first])
                yield Numbered(number, first + row, partial(block.__getitem__, row))
                number += step
            first += len(block)

    def head(self) -> list[Row]:
        return list(islice(iter(self._rows), HEAD))


def open_datasets(dataset: str, split: str) -> Rows:
    """Open a .parquet file, a folder that `datasets` saved or can load, or a hub name (`name:subset`)."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    path = Path(dataset)
    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(dataset)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        elif path.is_dir():
            found = datasets.load_dataset(dataset, split=split)
        else:
            return open_stream(dataset, split)
    except (OSError, ValueError, KeyError) as fault:
        raise _unusable(dataset, split, fault) from fault
    folder = path if path.is_dir() else path.parent
    return Table(_with_bytes(found), fingerprint(path, split), folder)


def fingerprint(path: Path, split: str) -> str:
    """Of a file, or of all files of a folder: names, sizes, and a few places of the first ones' bytes.

    The library's own changes when a file is copied or touched, and a harvest then would not go on.
    """
    digest = hashlib.blake2b(split.encode(), digest_size=16)
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    for number, file in enumerate(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{size};".encode())
        if number >= LOOKED_INTO:
            continue
        with open(file, "rb") as stored:
            for start in range(0, size, max(PIECE, size // PIECES)):
                stored.seek(start)
                digest.update(stored.read(PIECE))
            stored.seek(max(0, size - PIECE))  # parquet says at its end what it holds
            digest.update(stored.read(PIECE))
    return digest.hexdigest()


def open_stream(dataset: str, split: str) -> Stream:
    """A hub name, `name` or `name:subset`, whose rows are fetched as they are read, all of one revision."""
    import datasets
    from huggingface_hub import HfApi

    name, _, subset = dataset.partition(":")
    load = partial(datasets.load_dataset, name, subset or None, split=split, streaming=True)
    load()  # says in words what is wrong with a name, or with the network
    revision = HfApi().dataset_info(name).sha
    return Stream(_with_bytes(load(revision=revision)), str(revision))


def _with_bytes(found: Any) -> Any:
    """Pictures as they lie in the file, so that their hash is the file's and a broken one is one bad row."""
    import datasets

    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            found = found.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return found


def _unusable(dataset: str, split: str, fault: Exception) -> ValueError:
    reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
    return ValueError(
        f"dataset {dataset!r}: expected a file, a folder or a hub name with split {split!r}: {reason}"
    )
