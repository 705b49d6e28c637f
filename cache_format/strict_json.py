"""JSON as a stranger may have written it: one meaning or an error, and never more than a line of trouble."""

import json
from typing import Any


def parse_json(data: bytes) -> Any:
    """The value in `data` (UTF-8); ValueError where it is no JSON, repeats a key or nests too deep."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("expected JSON, found it nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected each key once, found {twice!r} twice")
    return content


def _constant(name: str) -> float:
    raise ValueError(f"expected finite numbers, found {name}")
