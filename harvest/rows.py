"""The dataset as numbered rows, whatever it is stored in; a row that cannot be read is a BadSample.

JSON Lines are indexed by byte offset and read where they lie, so a file larger than memory is fine.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..cache_format.permutation import permutation

Row = Mapping[str, Any]

MAX_LINE = 64 << 20
"""Bytes of a line of JSON that is read; one reader holds a few times as much."""
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


class JsonLines(IndexedRows):
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
        start, stop = self._spans[number].tolist()
        if stop - start > MAX_LINE:
            raise BadSample(f"a line of {stop - start} bytes; at most {MAX_LINE} are read")
        try:
            row = json.loads(self._map[start:stop].decode("utf-8-sig"))
        except (ValueError, RecursionError) as fault:
            raise BadSample(f"not a line of JSON in UTF-8: {fault}") from fault
        return _as_row(row)


class Table(IndexedRows):
    """Rows held by something with a length and integer access: a list, or a `datasets.Dataset`."""

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
    if path.is_file() and suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if path.is_file() and suffix == ".json":
        return _open_json(path)
    if path.is_file() and suffix != ".parquet":
        raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file, or a folder of `datasets`")
    if not path.exists() and (suffix in LOOKS_LIKE_A_FILE or dataset.startswith((".", "/", "~"))):
        raise ValueError(
            f"dataset {dataset!r}: expected a file, a folder or a hub name, found nothing of this name"
        )
    from .hub import open_datasets

    return open_datasets(dataset, split)


def _open_json(path: Path) -> Rows:
    """One list of samples, or COCO's object of images and annotations; one JSON object a line too."""
    data = path.read_bytes()
    fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b"\n" in data.strip():
            return JsonLines(path)
        raise ValueError(f"{path}: expected one JSON list of samples: {fault}") from fault
    if isinstance(content, dict):
        content = _coco_rows(path, content)
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"{path}: expected a JSON list of samples, found "
            f"{'an empty one' if content == [] else type(content).__name__}"
        )
    return Table(content, fingerprint, path.parent)


def _coco_rows(path: Path, content: dict[str, Any]) -> list[Row]:
    """A row for each caption of COCO's captions_*.json."""
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(
            f"{path}: expected a JSON list of samples, or COCO's `images` and `annotations`, "
            f"found an object of {', '.join(list(content)[:12]) or 'nothing'}"
        )
    files = {one.get("id"): one.get("file_name") for one in images if isinstance(one, dict)}
    return [
        {
            "id": one.get("id"),
            "image": files.get(one.get("image_id"), MISSING_IMAGE),
            "caption": one["caption"],
        }
        if isinstance(one, dict) and "caption" in one
        else one
        for one in annotations
    ]


MISSING_IMAGE = "an image that `images` does not list"


def _as_row(row: object) -> Row:
    if not isinstance(row, Mapping):
        raise BadSample(f"expected a JSON object, found {type(row).__name__}")
    return row


def _readable(reads: Iterator[Callable[[], Row]]) -> Iterator[Row]:
    for read in islice(reads, HEAD):
        try:
            yield read()
        except BadSample:
            continue  # it is met again, and listed, in the harvest's order
