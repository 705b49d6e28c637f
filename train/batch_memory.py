"""Memory of batches, used again once nobody holds it: the system clears new memory, page by page, and that
costs more than to fill it."""

import sys
from typing import NamedTuple

from .stored_rows import Rows


class _Room(NamedTuple):
    rows: Rows
    alone: int
    """Holders of an array where there are none but this room."""


class BatchMemory:
    """As many rooms for n_tokens tokens as batches were alive at a time."""

    def __init__(self) -> None:
        self._rooms: list[_Room] = []
        self._n_tokens = 0

    def rows(self, like: Rows, n_tokens: int) -> Rows:
        """Uninitialised rows for n_tokens tokens of `like`'s layers and widths, which no one else has."""
        if n_tokens != self._n_tokens:
            self._rooms, self._n_tokens = [], n_tokens
        free = (room for room in self._rooms if _holders(room.rows) == room.alone)
        room = next(free, None)
        if room is None:
            rows = like.room(n_tokens)
            room = _Room(rows, _holders(rows))
            self._rooms.append(room)
        return Rows(*(dict(part) for part in room.rows))


def _holders(rows: Rows) -> int:
    """References to any of the arrays; views and tensors that share their memory hold them too."""
    return max(sys.getrefcount(array) for part in rows for array in part.values())
