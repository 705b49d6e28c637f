"""A row of the dataset as a sample: an id, a conversation or a text, and what it says of its pictures.

Forms, told apart by their columns: LLaVA-Instruct and ShareGPT (`conversations` of {from, value}), chat
messages ({role, content}, content a text or a list of parts), pairs of {user, assistant}, image and question
(with an answer or none), image and caption, plain text. Imports no library of pictures.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .columns import Columns, find_columns
from .pictures import Picture
from .rows import BadSample, Row

IMAGE_TAG = "<image>"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "bard", "bing"), "assistant"),
    "system": "system",
}


class Turn(NamedTuple):
    role: str
    """user, assistant or system"""
    parts: list[str | None]
    """Texts in order; None where a picture stands."""


@dataclass(frozen=True)
class Sample:
    id: str
    turns: list[Turn]
    """Empty for plain text."""
    text: str
    """Plain text; empty for a conversation."""
    references: list[Any] = field(default_factory=list)
    """What the row gives for each picture: a path, an address, bytes."""
    pictures: list[Picture] = field(default_factory=list)
    """Loaded from the references."""


def parse_sample(row: Row, number: int, text_column: str | None) -> Sample:
    """The sample without its pictures loaded; BadSample, with a reason, where the row is not usable."""
    columns = _columns(row, text_column)
    if columns.form is None:
        wanted = text_column or "conversations, messages, question, caption or text"
        raise BadSample(f"expected a column {wanted}, found {sorted(map(str, row))[:12]}")
    references = _references(row, columns)
    turns = _turns(row, columns, references)
    words = [part for turn in turns for part in turn.parts if part and part.strip()]
    if not words:
        raise BadSample("no text")
    for word in words:
        _check_text(word)
    identity = sample_id(row, number)
    if len(turns) == 1 and turns[0].role == PLAIN:
        return Sample(identity, [], turns[0].parts[0] or "")
    tags = sum(part is None for turn in turns for part in turn.parts)
    if tags != len(references):
        raise BadSample(f"{tags} times {IMAGE_TAG} in the text, but {len(references)} images given")
    return Sample(identity, turns, "", references)


PLAIN = "plain"
"""Role of a text that is no conversation."""


def sample_id(row: Row, number: int) -> str:
    """The id alone, which decides the split."""
    column = _columns(row, None).id
    name = row[column] if column else None
    if isinstance(name, str | int) and not isinstance(name, bool) and name != "":
        return str(name).encode(errors="backslashreplace").decode()
    return f"row-{number}"


def is_val(identity: str, seed: int, fraction: float) -> bool:
    """Whether the sample belongs to split val: a hash of its id, so that all its tokens go together."""
    digest = hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _columns(row: Row, text_column: str | None) -> Columns:
    """A table fills with null what only other rows have."""
    return find_columns(tuple(key for key, value in row.items() if value is not None), text_column)


def _references(row: Row, columns: Columns) -> list[Any]:
    given = row[columns.image] if columns.image else None
    many = given if isinstance(given, list) else [given]
    return [one for one in many if one is not None and one != ""]


def _turns(row: Row, columns: Columns, references: list[Any]) -> list[Turn]:
    """The row's words in turns; pictures that the row's form places nowhere come first."""
    if columns.conversation is not None:
        given = _as_list(row[columns.conversation], columns.conversation)
        tagged = any(isinstance(turn, dict) and "from" in turn for turn in given)
        turns = [turn for one in given for turn in _parse_turn(one, columns.conversation, references)]
        return turns if tagged else _with_pictures(turns, len(references))
    if columns.question is not None:
        question = _as_text(row[columns.question], columns.question)
        if columns.context is not None and row[columns.context] != "":
            question += "\n" + _as_text(row[columns.context], columns.context)
        turns = [Turn("user", split_tags(question))]
        if columns.answer is not None:
            turns.append(Turn("assistant", [_as_text(row[columns.answer], columns.answer)]))
        return _with_pictures(turns, len(references))
    name = columns.caption if columns.caption is not None else columns.text
    assert name is not None
    text = _as_text(row[name], name)
    if not references:
        return [Turn(PLAIN, [text])]
    if IMAGE_TAG in text:
        return [Turn("user", split_tags(text))]
    return _with_pictures([Turn("user", []), Turn("assistant", [text])], len(references))


def _with_pictures(turns: list[Turn], n_pictures: int) -> list[Turn]:
    """Pictures in front of the first user turn, where no turn has a place for them."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or any(part is None for turn in turns for part in turn.parts):
        return turns
    placed = Turn("user", [*([None] * n_pictures), *turns[first].parts])
    return [*turns[:first], placed, *turns[first + 1 :]]


def _parse_turn(turn: Any, column: str, references: list[Any]) -> Iterator[Turn]:
    """One turn, or two of {user, assistant}; a picture that a part carries joins `references`."""
    if isinstance(turn, dict) and isinstance(turn.get("user"), str):
        yield Turn("user", split_tags(turn["user"]))
        if isinstance(turn.get("assistant"), str):
            yield Turn("assistant", split_tags(turn["assistant"]))
        return
    speaker, said = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    content = turn.get(said) if isinstance(turn, dict) else None
    if not isinstance(content, str | list):
        raise BadSample(
            f'{column}: expected {{"from": ..., "value": ...}} or {{"role": ..., "content": ...}}'
        )
    role = ROLES.get(str(turn.get(speaker)).lower())
    if role is None:
        raise BadSample(
            f"{column}: expected `{speaker}` to be one of {sorted(ROLES)}, "
            f"found {str(turn.get(speaker))[:40]!r}"
        )
    if isinstance(content, str):
        yield Turn(role, split_tags(content))
    else:
        yield Turn(role, [_parse_part(part, column, references) for part in content])


def _parse_part(part: Any, column: str, references: list[Any]) -> str | None:
    """A text, or None for a picture, of {"type": "text" | "image" | "image_url", ...}."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in ("image", "image_url"):
        raise BadSample(f"{column}: expected parts of type text, image or image_url, found {kind!r}")
    given = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name)), None)
    if given is not None:
        references.append(given["url"] if isinstance(given, dict) and "url" in given else given)
    return None


def split_tags(text: str) -> list[str | None]:
    """Texts of a turn, None for each <image>; the newline beside a tag belongs to the tag."""
    parts: list[str | None] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            parts.append(None)
        if piece.strip():
            parts.append(piece.strip("\n") if IMAGE_TAG in text else piece)
    return parts


def _as_list(data: Any, name: str) -> list[Any]:
    if not isinstance(data, list) or not data:
        raise BadSample(f"{name}: expected a list that is not empty, found {type(data).__name__}")
    return data


def _as_text(data: Any, name: str) -> str:
    """A text; of a list of texts, or of {answer: text}, all of them, a line each."""
    if isinstance(data, str):
        return data
    if isinstance(data, list):
        return "\n".join(_as_text(one, name) for one in data)
    if isinstance(data, dict) and isinstance(data.get("answer", data.get("raw")), str):
        return str(data.get("answer", data.get("raw")))
    raise BadSample(f"{name}: expected text, found {type(data).__name__}")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise BadSample(f"text holds half a surrogate pair at character {fault.start}") from fault
