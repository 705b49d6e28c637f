"""The dataset as numbered rows, whatever it is stored in; a row that cannot be read is a BadSample."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..cache_format.permutation import permutation

Row = Mapping[str, Any]

LOOKS_LIKE_A_FILE = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".csv", ".tsv", ".arrow")
HEAD = 100
"""Rows that are looked at for their columns."""
ORDER = 0xDA7A
"""Keeps the order of samples apart from other uses of the seed."""


class BadSample(ValueError):
    """A sample that cannot be used; its text is the reason, as rejected.jsonl will give it."""


class Numbered(NamedTuple):
    """A row with its place in the harvest."""

    number: int
    """Of the sample, in harvest order, over all ranks."""
    row: int
    """In the dataset."""
    read: Callable[[], Row]
    """BadSample where the row is not readable; may be called in another thread."""


class Rows(Protocol):
    fingerprint: str
    """Another one for other content."""
    folder: Path | None
    """Where relative image paths start."""

    def walk(self, seed: int, start: int, step: int) -> Iterator[Numbered]:
        """Samples start, start + step, ... of the order that the seed decides."""

    def head(self) -> list[Row]:
        """The first readable rows, as they stand in the dataset."""


class IndexedRows:
    """Rows that are read by number, in any order."""

    fingerprint: str
    folder: Path | None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> Row:
        raise NotImplementedError

    def walk(self, seed: int, start: int, step: int) -> Iterator[Numbered]:
        order = permutation(len(self), seed, ORDER)
        for number in range(start, len(order), step):
            row = int(order[number])
            yield Numbered(number, row, partial(self.__getitem__, row))

    def head(self) -> list[Row]:
        return list(_readable(partial(self.__getitem__, row) for row in range(min(HEAD, len(self)))))


class Table(IndexedRows):
    """Rows held by something with a length and integer access: a list, or a `datasets.Dataset`."""

    def __init__(self, rows: Any, fingerprint: str, folder: Path | None) -> None:
        self._rows, self.fingerprint, self.folder = rows, fingerprint, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        try:
            row = self._rows[int(number)]
        except Exception as fault:  # a damaged block of a table, a feature that its library cannot decode
            raise BadSample(f"the row cannot be read: {type(fault).__name__}: {fault}") from fault
        return as_row(row)


def open_rows(dataset: str, split: str) -> Rows:
    """Open a .jsonl, .json or .parquet file, a folder of `datasets`, or a hub name."""
    path = Path(dataset)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".jsonl", ".ndjson", ".json"):
        from .json_rows import open_json, open_json_lines

        return open_json(path) if suffix == ".json" else open_json_lines(path)
    if path.is_file() and suffix != ".parquet":
        raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file, or a folder of `datasets`")
    if not path.exists() and (suffix in LOOKS_LIKE_A_FILE or dataset.startswith((".", "/", "~"))):
        raise ValueError(
            f"dataset {dataset!r}: expected a file, a folder or a hub name, found nothing of this name"
        )
    from .hub import open_datasets

    return open_datasets(dataset, split)


def as_row(row: object) -> Row:
    if not isinstance(row, Mapping):
        raise BadSample(f"expected a JSON object, found {type(row).__name__}")
    return row


def _readable(reads: Iterator[Callable[[], Row]]) -> Iterator[Row]:
    for read in islice(reads, HEAD):
        try:
            yield read()
        except BadSample:
            continue  # it is met again, and listed, in the harvest's order
