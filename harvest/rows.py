"""The dataset as numbered rows, whatever it is stored in; a row that cannot be read is a BadSample.

JSON Lines are indexed by byte offset and read where they lie, so a file larger than memory is fine.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cache_format.permutation import permutation

Row = Mapping[str, Any]


class BadSample(ValueError):
    """A sample that cannot be used; its text is the reason, as rejected.jsonl will give it."""


class Rows(Protocol):
    """Random access to the rows of a dataset."""

    fingerprint: str
    folder: Path | None
    """Where relative image paths start."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row:
        """Row `number`; BadSample where it is not readable."""


class JsonLines:
    """A .jsonl file; blank lines are not rows."""

    def __init__(self, path: Path) -> None:
        self.folder: Path | None = path.parent
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty; expected one JSON object a line")
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        digest, spans, start = hashlib.blake2b(digest_size=16), [], 0
        for line in iter(self._map.readline, b""):
            digest.update(line)
            if line.strip():
                spans.append((start, start + len(line)))
            start += len(line)
        self.fingerprint = digest.hexdigest()
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> Row:
        start, stop = self._spans[number]
        try:
            row = json.loads(self._map[start:stop].decode("utf-8-sig"))
        except (ValueError, RecursionError) as fault:
            raise BadSample(f"not a line of JSON in UTF-8: {fault}") from fault
        return _as_row(row)


class Table:
    """Rows held by something with a length and integer access: a JSON list, or a `datasets.Dataset`."""

    def __init__(self, rows: Any, fingerprint: str, folder: Path | None) -> None:
        self._rows, self.fingerprint, self.folder = rows, fingerprint, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return _as_row(self._rows[int(number)])


def open_rows(dataset: str, split: str) -> Rows:
    """Open a .jsonl, .json or .parquet file, a folder of `datasets`, or a hub name."""
    path = Path(dataset)
    suffix = path.suffix.lower()
    if path.is_file() and suffix == ".jsonl":
        return JsonLines(path)
    if path.is_file() and suffix == ".json":
        data = path.read_bytes()
        try:
            rows = json.loads(data.decode("utf-8-sig"))
        except ValueError as fault:
            raise ValueError(f"{path}: expected one JSON list of samples: {fault}") from fault
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a JSON list of samples, found {type(rows).__name__}")
        return Table(rows, hashlib.blake2b(data, digest_size=16).hexdigest(), path.parent)
    if path.is_file() and suffix != ".parquet":
        raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file, or a folder of `datasets`")
    return _open_datasets(dataset, path, split)


def sample_order(n_rows: int, seed: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Row of each sample number that belongs to `rank`; sample numbers count over all ranks."""
    return permutation(n_rows, seed, 0xDA7A)[rank::world_size]


def _open_datasets(dataset: str, path: Path, split: str) -> Rows:
    import datasets

    try:
        if path.is_file():
            found = datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(dataset)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(dataset, split=split)
    except (OSError, ValueError, KeyError) as fault:
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ValueError(
            f"dataset {dataset!r}: expected a file, a folder or a hub name with split {split!r}: {reason}"
        ) from fault
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    return Table(found, found._fingerprint, folder)


def _as_row(row: object) -> Row:
    if not isinstance(row, Mapping):
        raise BadSample(f"expected a JSON object, found {type(row).__name__}")
    return row


def numbered(rows: Rows, order: npt.NDArray[np.int64], start: int) -> Iterator[tuple[int, int]]:
    """(place in `order`, row number) from place `start` on."""
    yield from enumerate(order[start:].tolist(), start=start)
