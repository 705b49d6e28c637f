"""Samples as pages show them: token strings in order, and pictures with the rectangle of each patch.

A sample is a plain object: `id`; `k`, a digit a token, its kind; `t`, the strings of all tokens but those of
pictures; `gaps`, places before which tokens are missing, because they were not stored; `text`, the source
text, only where there is no tokenizer; and `images`, each with `src` (or `why` there is none), `w`, `h`,
`tokens` (places of its tokens) and `grid` (their rectangles, in the block's list, in percent of the picture).
"""

import json
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..cache_format.files import write_file
from ..cache_format.layout import KINDS
from ..cache_format.provenance import patch_rectangle
from ..harvest.pictures import PictureSource, load_picture
from ..harvest.provenance import SourceData, sample_text
from ..harvest.rows import BadSample
from ..train.source import Source

IMAGE = KINDS.index("image")
SIDE = 448
"""Pixels: pictures are made smaller until their longer side fits."""
SMALL = 128
"""Pixels: pictures up to this side are kept exactly, as PNG."""
BLOCK = 32
"""Samples in one file."""
COLUMNS = ("token_id", "position", "row", "col")
TOKEN_BYTES = 40
"""Of the table, for each token of the source."""


class TokenTable:
    """The tokens of a source by sample, in the order of the text; `TOKEN_BYTES` a token."""

    def __init__(self, source: Source) -> None:
        splits = [cache[source.split] for cache in source.caches]
        self.columns = {n: np.concatenate([s.token_column(n) for s in splits]) for n in COLUMNS}
        self.kind = source.kind
        self.sample = source.sample
        self._order = np.lexsort((self.columns["position"], self.sample)).astype(np.int32)
        in_order = self.sample[self._order]
        self._first = np.searchsorted(in_order, np.arange(int(in_order[-1]) + 2))
        self.rank = np.empty(len(in_order), np.int32)
        """(token,): its place among the stored tokens of its sample"""
        self.rank[self._order] = np.arange(len(in_order)) - self._first[in_order]
        self._cache_ends = np.cumsum([len(split) for split in splits])
        self._cache_sample = [split.token_column("sample") for split in splits]

    @property
    def longest(self) -> int:
        """Stored tokens of the longest sample."""
        return int(np.diff(self._first).max())

    def tokens(self, sample: int) -> npt.NDArray[np.int32]:
        """Numbers of a sample's stored tokens, by position."""
        return self._order[self._first[sample] : self._first[sample + 1]]

    def in_cache(self, token: int) -> tuple[int, int]:
        """(which cache, the sample's number there) of a token."""
        nth = int(np.searchsorted(self._cache_ends, token, side="right"))
        first = int(self._cache_ends[nth - 1]) if nth else 0
        return nth, int(self._cache_sample[nth][token - first])


class Strings:
    """Token strings, each asked for once."""

    def __init__(self, data: SourceData) -> None:
        self._data = data
        self._known: dict[int, str | None] = {}

    def __call__(self, token_id: int) -> str | None:
        if token_id not in self._known:
            self._known[token_id] = self._data.token_string(token_id)
        return self._known[token_id]


class _Picture(NamedTuple):
    src: str | None
    why: str | None


class SampleWriter:
    """Writes blocks of samples below `folder`, and each picture once, named by its content."""

    def __init__(self, source: Source, table: TokenTable, data: list[SourceData], folder: Path) -> None:
        self._table, self._data, self._folder = table, data, folder
        self._lines = [cache.samples() for cache in source.caches]
        self._strings = Strings(data[0])
        self.missing: Counter[str] = Counter()
        """Why pictures or texts are not shown."""

    def write_block(self, number: int, samples: Iterable[int]) -> None:
        grids: dict[str, int] = {}
        found = {str(sample): self._sample(sample, grids) for sample in samples}
        block = {"grids": [json.loads(text) for text in grids], "samples": found}
        write_data(self._folder, f"samples-{number}", block)

    def _sample(self, sample: int, grids: dict[str, int]) -> dict[str, Any]:
        tokens = self._table.tokens(sample)
        nth, inside = self._table.in_cache(int(tokens[0]))
        line = self._lines[nth].get(inside, {})
        kind, ids, position = (
            a[tokens]
            for a in (self._table.kind, self._table.columns["token_id"], self._table.columns["position"])
        )
        strings = [self._strings(i) for i in ids[kind != IMAGE].tolist()]
        known = None not in strings
        source = self._source(nth, line)
        found = {
            "id": line.get("id"),
            "k": "".join(map(str, kind.tolist())),
            "t": strings if known else [f"#{i} " for i in ids[kind != IMAGE].tolist()],
            "gaps": [0, *(np.flatnonzero(np.diff(position) > 1) + 1).tolist()][not position[0] :],
        }
        if not known and source is not None:
            found["text"] = sample_text(source)
        images = [self._image(nth, image, tokens, source, grids) for image in line.get("images", [])]
        return {**found, "images": images} if images else found

    def _source(self, nth: int, line: dict[str, Any]) -> Any:
        """The sample as the dataset has it; None where it has not."""
        try:
            return self._data[nth].sample(line.get("row"))
        except BadSample as fault:
            self.missing[str(fault)] += 1
            return None

    def _image(
        self,
        nth: int,
        image: dict[str, Any],
        tokens: npt.NDArray[np.int32],
        source: Any,
        grids: dict[str, int],
    ) -> dict[str, Any]:
        columns = self._table.columns
        first, last = image.get("positions", (0, 0))
        position, row, col = (columns[name][tokens] for name in ("position", "row", "col"))
        mine = np.flatnonzero((position >= first) & (position < last) & (row >= 0))
        width, height = image.get("size") or (1, 1)
        at = zip(*(column[mine].tolist() for column in (position, row, col)), strict=True)
        grid = [percent(patch_rectangle(image, *place), width, height) for place in at]
        picture = self._picture(nth, image, source)
        return {
            **{name: value for name, value in picture._asdict().items() if value is not None},
            "w": width,
            "h": height,
            "tokens": mine.tolist(),
            "grid": grids.setdefault(json.dumps(grid), len(grids)),
        }

    def _picture(self, nth: int, image: dict[str, Any], source: Any) -> _Picture:
        if source is None:
            return _Picture(None, "the dataset is not on this machine")
        try:
            found = self._data[nth].find_picture(image, source)
            if found is None or not found.same:
                why = "is not in the dataset" if found is None else "has changed since the harvest"
                raise BadSample(f"image {image.get('file')!r} {why}")
            return _Picture(self._copy(found.data, str(image["sha256"])), None)
        except BadSample as fault:
            self.missing[str(fault)] += 1
            return _Picture(None, str(fault))

    def _copy(self, data: bytes, sha256: str) -> str:
        """Upright and small; the path from the page."""
        for suffix in ("png", "jpg"):
            if (self._folder / "pictures" / f"{sha256[:24]}.{suffix}").exists():
                return f"pictures/{sha256[:24]}.{suffix}"
        picture = load_picture(data, PictureSource(None)).image
        exact = max(picture.size) <= SMALL
        if max(picture.size) > SIDE:
            picture.thumbnail((SIDE, SIDE))
        out = BytesIO()
        if exact:
            picture.save(out, "PNG")
        else:
            picture.save(out, "JPEG", quality=85)
        name = f"pictures/{sha256[:24]}.{'png' if exact else 'jpg'}"
        (self._folder / "pictures").mkdir(exist_ok=True)
        write_file(self._folder / name, out.getvalue())
        return name


def percent(rectangle: list[float] | None, width: int, height: int) -> list[float] | None:
    """[left, top, right, bottom] in pixels as percent of the picture."""
    if rectangle is None:
        return None
    sizes = (width, height, width, height)
    return [round(100 * edge / size, 2) for edge, size in zip(rectangle, sizes, strict=True)]


def write_data(folder: Path, name: str, data: Any) -> None:
    """A file that a page loads as a script: file:// pages may not fetch JSON."""
    (folder / "data").mkdir(exist_ok=True)
    text = f"clt.add({json.dumps(name)},{json.dumps(data, separators=(',', ':'))});\n"
    write_file(folder / "data" / f"{name}.js", text.encode())
