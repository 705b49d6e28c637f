"""Rows of JSON files, found by byte offset and read where they lie: a file larger than memory is fine.

One object a line, or one list of them; COCO's captions alone, whose parts refer to each other, are held.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .rows import BadSample, IndexedRows, Row, Rows, Table, as_row

MAX_ROW = 64 << 20
"""Bytes of a row that is read; one reader holds a few times as much."""
HASHED = 16 << 20
"""Bytes that are hashed at a time."""
MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark."""
MISSING_IMAGE = "an image that `images` does not list"

_PARTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
"""What tells where an element of a list ends: whole strings, brackets and commas; a `"` alone has no end."""

Span = tuple[int, int]


class JsonRows(IndexedRows):
    """Rows at known places of a file."""

    def __init__(self, path: Path, stored: mmap.mmap, spans: list[Span]) -> None:
        self.folder: Path | None = path.parent
        self.fingerprint = _hash(stored)
        self._map = stored
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> Row:
        start, stop = self._spans[number].tolist()
        if stop - start > MAX_ROW:
            raise BadSample(f"a row of {stop - start} bytes; at most {MAX_ROW} are read")
        try:
            row = json.loads(self._map[start:stop].decode("utf-8-sig"))
        except (ValueError, RecursionError) as fault:
            raise BadSample(f"not JSON in UTF-8: {fault}") from fault
        return as_row(row)


def open_json_lines(path: Path) -> JsonRows:
    """A .jsonl file; blank lines are not rows."""
    stored = _open_map(path, "one JSON object a line")
    return JsonRows(path, stored, list(_lines(stored)))


def open_json(path: Path) -> Rows:
    """One list of samples, or COCO's object of images and annotations; one JSON object a line too."""
    expected = "one JSON list of samples"
    stored = _open_map(path, expected)
    start = len(MARK) if stored[: len(MARK)] == MARK else 0
    if (first := re.compile(rb"\S").search(stored, start)) is None:
        raise ValueError(f"{path}: expected {expected}, found blanks alone")
    if first[0] == b"{":
        return _open_object(path, stored)
    if first[0] != b"[":
        raise ValueError(f"{path}: expected {expected}, found {bytes(stored[first.start() :][:20])!r}")
    try:
        spans = list(_elements(stored, first.start()))
    except ValueError as fault:
        raise ValueError(f"{path}: expected {expected}: {fault}") from fault
    if not spans:
        raise ValueError(f"{path}: expected {expected}, found an empty one")
    return JsonRows(path, stored, spans)


def _open_map(path: Path, expected: str) -> mmap.mmap:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected {expected}")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _hash(stored: mmap.mmap) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(stored), HASHED):
        digest.update(stored[start : start + HASHED])
    return digest.hexdigest()


def _lines(stored: mmap.mmap) -> Iterator[Span]:
    start = 0
    while start < len(stored):
        found = stored.find(b"\n", start)
        stop = len(stored) if found < 0 else found + 1
        if stop - start > MAX_ROW or stored[start:stop].strip():
            yield start, stop
        start = stop


def _elements(stored: mmap.mmap, opening: int) -> Iterator[Span]:
    """Spans of the elements of the list that opens there; ValueError where it has no end, or more follows."""
    depth, start = 0, opening + 1
    for part in _PARTS.finditer(stored, opening):
        match part[0]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
            case b'"':
                raise ValueError(f"the string at byte {part.start()} has no end")
        if (depth, part[0]) != (1, b",") and depth > 0:
            continue
        is_last = depth <= 0
        if not is_last or start > opening + 1 or stored[start : part.start()].strip():
            yield start, part.start()
        start = part.end()
        if is_last:
            break
    else:
        raise ValueError("the list has no end")
    if stored[start:].strip():
        raise ValueError(f"more follows behind the list, at byte {start}")


def _open_object(path: Path, stored: mmap.mmap) -> Rows:
    try:
        content = json.loads(stored[:].decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        if b"\n" in stored[:].strip():
            return open_json_lines(path)
        raise ValueError(f"{path}: expected one JSON list of samples: {fault}") from fault
    return Table(_coco_rows(path, content), _hash(stored), path.parent)


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
