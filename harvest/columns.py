"""Which column of a dataset is what: found by name, row by row, so that a file may mix forms."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

CONVERSATION = ("conversations", "conversation", "messages", "chat", "dialog", "texts")
QUESTION = ("question", "query", "instruction", "prompt")
CONTEXT = ("input", "context")
ANSWER = ("answer", "answers", "response", "output", "completion")
CAPTION = ("caption", "captions", "sentences_raw", "sentences")
TEXT = ("text", "content")
IMAGE = (
    *("image", "images", "image_path", "img_path", "image_file", "image_name", "image_url", "img"),
    *("picture", "jpg", "png", "webp"),
)
ID = ("id", "question_id", "sample_id", "uid", "uuid", "key", "__key__", "_id")


class Columns(NamedTuple):
    """A column's name by its role; None: the row has none."""

    conversation: str | None
    """A list of turns."""
    question: str | None
    context: str | None
    """Goes behind the question."""
    answer: str | None
    caption: str | None
    """A text, or a list of them, about the image."""
    text: str | None
    image: str | None
    """A path, bytes, or a list of either."""
    id: str | None

    @property
    def form(self) -> str | None:
        """The column that is read as the sample's words; None: the row is not understood."""
        return self.conversation or self.question or self.caption or self.text

    def describe(self, keys: Iterable[str]) -> str:
        """One line for people: `conversation: conversations, image: image; not used: model`."""
        used = {role: name for role, name in self._asdict().items() if name is not None}
        rest = [key for key in keys if key not in used.values()]
        line = ", ".join(f"{role}: {name}" for role, name in used.items())
        return line + (f"; not used: {', '.join(rest)}" if rest else "")


@lru_cache(maxsize=1024)
def find_columns(keys: tuple[str, ...], text_column: str | None) -> Columns:
    """Roles of the columns of a row that has `keys`; text_column, where given, is plain text or a caption."""
    present = {str(key).lower(): key for key in reversed(keys)}

    def first(names: Sequence[str]) -> str | None:
        return next((present[name] for name in names if name in present), None)

    image, identity = first(IMAGE), first(ID)
    if text_column is not None:
        text = text_column if text_column in keys else None
        return Columns(None, None, None, None, None, text, image, identity)
    question = first(QUESTION)
    return Columns(
        conversation=first(CONVERSATION),
        question=question,
        context=first(CONTEXT) if question else None,
        answer=first(ANSWER) if question else None,
        caption=first(CAPTION),
        text=first(TEXT),
        image=image,
        id=identity,
    )


def describe_columns(heads: Sequence[Sequence[str]], text_column: str | None) -> str:
    """What is said of a dataset whose first rows have these keys; ValueError where none is understood."""
    found = [find_columns(tuple(keys), text_column) for keys in heads]
    if heads and not any(columns.form for columns in found):
        wanted = f"`{text_column}`" if text_column else "conversations, messages, question, caption or text"
        raise ValueError(
            f"expected a column {wanted}, found in the first row {', '.join(heads[0]) or 'none'}; "
            "name the one that holds text with --text-column, or rename one"
        )
    union = tuple(dict.fromkeys(chain.from_iterable(heads)))
    return find_columns(union, text_column).describe(union)
