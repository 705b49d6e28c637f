"""A row of the dataset as a sample: an id, a conversation or a text, and its pictures.

Understood: LLaVA-Instruct (`conversations` of {from, value}, `image` as a path or a list of them, `<image>`
where each picture stands) and plain text (`text`, or --text-column).
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from .rows import BadSample, Row

IMAGE_TAG = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Turn(NamedTuple):
    role: str
    """user, assistant or system"""
    parts: list[str | None]
    """Texts in order; None where a picture stands."""


class Picture(NamedTuple):
    reference: str
    """As the dataset names it."""
    sha256: str
    """Of the file's bytes."""
    image: Image.Image
    """RGB, upright"""


@dataclass(frozen=True)
class Sample:
    id: str
    turns: list[Turn]
    """Empty for plain text."""
    text: str
    """Plain text; empty for a conversation."""
    pictures: list[Picture]


def parse_sample(row: Row, number: int, text_column: str | None, image_root: Path | None) -> Sample:
    """BadSample, with a reason, where the row is not usable."""
    name = row.get("id")
    identity = str(name) if isinstance(name, str | int) and name != "" else f"row-{number}"
    if text_column is None and "conversations" in row:
        turns = [_parse_turn(turn) for turn in _as_list(row["conversations"], "conversations")]
        pictures = _load_pictures(row.get("image"), image_root)
        tags = sum(part is None for turn in turns for part in turn.parts)
        if tags != len(pictures):
            raise BadSample(f"{tags} times {IMAGE_TAG} in the text, but {len(pictures)} images given")
        if not any(part and part.strip() for turn in turns for part in turn.parts):
            raise BadSample("no text")
        return Sample(identity, turns, "", pictures)
    text = row.get(text_column or "text")
    if not isinstance(text, str):
        raise BadSample(
            f"expected `conversations` or a string in `{text_column or 'text'}`, "
            f"found columns {sorted(row)[:12]}"
        )
    if not text.strip():
        raise BadSample("no text")
    return Sample(identity, [], text, [])


def sample_id(row: Row, number: int) -> str:
    """The id alone, which decides the split."""
    name = row.get("id")
    return str(name) if isinstance(name, str | int) and name != "" else f"row-{number}"


def is_val(identity: str, seed: int, fraction: float) -> bool:
    """Whether the sample belongs to split val: a hash of its id, so that all its tokens go together."""
    digest = hashlib.blake2b(f"{seed}:{identity}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _parse_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadSample('conversations: expected {"from": ..., "value": ...}')
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise BadSample(
            f"conversations: expected `from` to be one of {sorted(ROLES)}, found {turn.get('from')!r}"
        )
    parts: list[str | None] = []
    for number, text in enumerate(turn["value"].split(IMAGE_TAG)):
        if number:
            parts.append(None)
        if text.strip():
            parts.append(text.strip("\n") if IMAGE_TAG in turn["value"] else text)
    return Turn(role, parts)


def _as_list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise BadSample(f"{name}: expected a list that is not empty")
    return data


def _load_pictures(reference: Any, root: Path | None) -> list[Picture]:
    if reference is None or reference == "":
        return []
    many = reference if isinstance(reference, list) else [reference]
    return [_load_picture(one, root) for one in many]


def _load_picture(reference: Any, root: Path | None) -> Picture:
    name, data = _picture_bytes(reference, root)
    try:
        with Image.open(io.BytesIO(data)) as file:
            upright = ImageOps.exif_transpose(file)
            rgb = upright.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise BadSample(f"image {name!r} cannot be read: {fault}") from fault
    return Picture(name, hashlib.sha256(data).hexdigest(), rgb)


def _picture_bytes(reference: Any, root: Path | None) -> tuple[str, bytes]:
    if isinstance(reference, Image.Image):
        buffer = io.BytesIO()
        reference.save(buffer, "PNG")
        return "embedded", buffer.getvalue()
    if isinstance(reference, dict) and isinstance(reference.get("bytes"), bytes):
        return str(reference.get("path") or "embedded"), reference["bytes"]
    if not isinstance(reference, str):
        raise BadSample(f"image: expected a path, found {type(reference).__name__}")
    if "://" in reference:
        raise BadSample(f"image {reference!r} is an address; addresses are not fetched, download it first")
    base = (root or Path()).resolve()
    path = (base / reference).resolve()
    if not path.is_relative_to(base):
        raise BadSample(
            f"image {reference!r} lies outside {base}; set --image-root to a folder that holds it"
        )
    try:
        return reference, path.read_bytes()
    except OSError as fault:
        raise BadSample(f"image {reference!r} cannot be read: {fault.strerror} ({path})") from fault
