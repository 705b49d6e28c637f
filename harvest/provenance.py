"""What a token of a cache was in the source data, read where that still lies: text, picture, token string.

Imports nothing heavy: neither torch nor transformers; the dataset's library only for a dataset that needs it.
Whatever is no longer there, or no longer the same, is a note and not an error.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..cache_format.manifest import Scalar
from .pictures import PictureSource, picture_bytes
from .rows import BadSample, IndexedRows, open_rows
from .samples import IMAGE_TAG, Sample, parse_sample

MOST_SHOWN = 2000
"""Characters of a text that are printed."""


class SourceOfToken(NamedTuple):
    token_string: str | None
    text: str | None
    """The conversation, a line for each turn, or the plain text."""
    image_path: str | None
    """Where the picture's file lies, where it is a file."""
    image_unchanged: bool | None
    """Its bytes have the hash that the cache recorded; None where it cannot be read."""
    notes: list[str]
    """What could not be read, and why."""


def read_source(
    trace: Mapping[str, Any], source: Mapping[str, Scalar], dataset: str | None = None
) -> SourceOfToken:
    """trace: from `trace_token`; source: the manifest's; dataset: where the dataset lies now."""
    data = SourceData(source, dataset)
    text, path, unchanged = None, None, None
    try:
        sample = data.sample(trace["dataset_row"])
        if sample is not None:
            text = sample_text(sample)
            if trace["image"] is not None:
                path, unchanged = _look_at_image(trace["image"], sample, data)
    except BadSample as fault:
        data.notes.append(str(fault))
    return SourceOfToken(data.token_string(int(trace["token_id"])), text, path, unchanged, data.notes)


class SourceData:
    """The dataset and the tokenizer that a cache's manifest names, as far as they lie on this machine."""

    def __init__(self, source: Mapping[str, Scalar], dataset: str | None = None) -> None:
        self.notes: list[str] = []
        """What is missing, and why."""
        self._tokenizer = _open_tokenizer(source, self.notes)
        self._rows = _open_dataset(source, dataset, self.notes)
        self._source = source

    def token_string(self, token_id: int) -> str | None:
        """None without a tokenizer; of a part of a character, the vocabulary's own name for it."""
        if self._tokenizer is None:
            return None
        string: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece if "\N{REPLACEMENT CHARACTER}" in string or not string else string

    def sample(self, row: int | None) -> Sample | None:
        """Of a row of the dataset, its pictures not loaded; BadSample where it is not what was harvested."""
        if row is None:
            if self._rows is not None:
                raise BadSample("the cache does not say which row of the dataset this is")
            return None
        if self._rows is None:
            return None
        column = self._source.get("text_column")
        return parse_sample(self._rows[row], row, None if column is None else str(column))

    def find_picture(self, image: Mapping[str, Any], sample: Sample) -> "FoundPicture | None":
        """image: of a line of samples.jsonl; BadSample where its file cannot be read."""
        root, outside = self._source.get("image_root"), bool(self._source.get("allow_outside"))
        folder = None if self._rows is None else self._rows.folder
        places = PictureSource(Path(str(root)) if root else folder, outside)
        for reference in sample.references:
            name, data = picture_bytes(reference, places)
            if name == image["file"]:
                same = hashlib.sha256(data).hexdigest() == image["sha256"]
                if same or name != "embedded":
                    path = (places.root or Path()) / name if isinstance(reference, str) else None
                    return FoundPicture(path if path and path.is_file() else None, data, same)
        return None


class FoundPicture(NamedTuple):
    path: Path | None
    """None where the row itself holds it"""
    data: bytes
    same: bool
    """It has the hash that the cache recorded."""


def sample_text(sample: Sample) -> str:
    """For people: `user: <image> What is this?`, a line for each turn."""
    if not sample.turns:
        return sample.text
    return "\n".join(
        f"{turn.role}: " + " ".join(IMAGE_TAG if part is None else part for part in turn.parts)
        for turn in sample.turns
    )


def render_token(trace: Mapping[str, Any], found: SourceOfToken) -> str:
    """What `clt info --token` prints."""
    string = "" if found.token_string is None else f" {found.token_string!r}"
    lines = [
        f"token {trace['token']} of {trace['split']}: {trace['kind']}{string} (id {trace['token_id']}"
        f"{', a sink' if trace['sink'] else ''}), in window {trace['window']}",
        f"  sample     {trace['sample']}, id {trace['id']!r}, row {trace['dataset_row']} of the dataset",
        f"  position   {trace['position']} of {trace['length']}"
        + (f" ({trace['cut']} more were cut off)" if trace["cut"] else ""),
    ]
    if image := trace["image"]:
        width, height = image["size"]
        lines.append(f"  image      {image['file']}, {width} x {height}, sha256 {image['sha256']}")
        if found.image_unchanged is not None:
            state = "unchanged" if found.image_unchanged else "NOT the same bytes as at the harvest"
            lines.append(f"             {found.image_path or 'in the row itself'}: {state}")
        patch = f"row {image['row']}, column {image['col']}" if image["row"] >= 0 else "none is known"
        if trace["kind"] == "template":
            patch = "none: it separates rows or tiles"
        elif image["tiles"] > 1:
            patch += f" of tile {image['tile']} (of 0 to {image['tiles'] - 1})"
        if image["rectangle"] is not None:
            left, top, right, bottom = image["rectangle"]
            patch += f": x {left:g} to {right:g}, y {top:g} to {bottom:g} of the upright picture"
        lines.append(f"  patch      {patch}")
    if found.text is not None:
        shown = found.text if len(found.text) <= MOST_SHOWN else found.text[:MOST_SHOWN] + " ..."
        lines.append("  text       " + printable(shown).replace("\n", "\n             "))
    lines += [f"  note       {note}" for note in found.notes]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Without characters that steer a terminal."""
    steers = {c for c in set(text) if c != "\n" and unicodedata.category(c)[0] == "C"}
    return "".join("\N{REPLACEMENT CHARACTER}" if c in steers else c for c in text)


def _open_dataset(source: Mapping[str, Scalar], dataset: str | None, notes: list[str]) -> IndexedRows | None:
    place = dataset or str(source.get("dataset"))
    if not Path(place).exists():
        notes.append(f"dataset {place} is not on this machine; --dataset says where it lies now")
        return None
    try:
        rows = open_rows(place, str(source.get("dataset_split")))
    except (ValueError, OSError, ImportError) as fault:
        notes.append(f"dataset {place} cannot be read: {fault}")
        return None
    if rows.fingerprint != source.get("dataset_fingerprint"):
        notes.append(f"dataset {place} is not the one of the harvest, so its text is not shown")
        return None
    assert isinstance(rows, IndexedRows), "what lies on this machine is read by number"
    return rows


def _look_at_image(
    image: Mapping[str, Any], sample: Sample, data: SourceData
) -> tuple[str | None, bool | None]:
    """(path of its file, whether it has the recorded hash)"""
    found = data.find_picture(image, sample)
    if found is None:
        return None, None
    return None if found.path is None else str(found.path), found.same


def _open_tokenizer(source: Mapping[str, Scalar], notes: list[str]) -> Any:
    """The model's tokenizer.json, where model or hub cache lie on this machine; else None."""
    model, revision = str(source.get("model")), source.get("revision")
    try:
        from huggingface_hub import try_to_load_from_cache
        from tokenizers import Tokenizer

        path: Any = Path(model) / "tokenizer.json"
        if not path.is_file():
            commit = None if revision is None else str(revision)
            folder = Path(model).is_absolute()
            path = None if folder else try_to_load_from_cache(model, "tokenizer.json", revision=commit)
        if not isinstance(path, str | Path):
            notes.append(f"token string: no tokenizer.json of {model} on this machine")
            return None
        return Tokenizer.from_file(str(path))
    except (ImportError, OSError, ValueError, json.JSONDecodeError) as fault:
        notes.append(f"token string: {fault}")
        return None
