"""One layer's MLP inputs in the order on disk, decoded ahead; nothing but that layer's files is read."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..cache_format.layout import CHUNK
from ..train.order import Ints
from ..train.reader import Batch, read_in_order
from ..train.source import Source, default_threads
from ..train.stored_rows import Rows

SITE = "mlp_in"


class LayerReader:
    """Batches of the tokens that count, of `batch_tokens` stored ones each; two are held.

    The layer is one file a window, so that its chunks, not its layers, are what threads share.
    """

    def __init__(self, source: Source, place: int, batch_tokens: int, threads: int | None) -> None:
        self.source, self.threads = source.only(place), threads or default_threads()
        self.groups = read_in_order(source, batch_tokens)
        self.waited = 0.0
        """Seconds that `batches` waited for decoding."""

    def batches(self, first: int = 0) -> Iterator[tuple[int, Batch]]:
        """From group number `first` on: (the number of the group after it, its batch)."""
        with (
            ThreadPoolExecutor(self.threads, "clt-decode") as pool,
            ThreadPoolExecutor(self.threads, "clt-part") as parts,
            ThreadPoolExecutor(1, "clt-fill") as filler,
        ):
            ahead: Future[Batch] | None = None
            for number in range(first, len(self.groups)):
                following = ahead or filler.submit(self._read, number, pool, parts)
                began = time.monotonic()
                batch = following.result()
                self.waited += time.monotonic() - began
                if number + 1 < len(self.groups):
                    ahead = filler.submit(self._read, number + 1, pool, parts)
                yield number + 1, batch

    def _read(self, number: int, pool: ThreadPoolExecutor, parts: ThreadPoolExecutor) -> Batch:
        chunks = self.groups[number]
        place, token = self.source.tokens_of(chunks)
        rows = self.source.allocate(len(chunks), (SITE,))
        edges = np.linspace(0, len(chunks), min(self.threads, len(chunks)) + 1).astype(int)

        def fill(first: int, end: int) -> None:
            mine = slice(first * CHUNK, end * CHUNK)
            part = Rows(*({s: array[:, mine] for s, array in some.items()} for some in rows))
            self.source.fill(part, chunks[first:end], pool)

        list(parts.map(fill, edges[:-1].tolist(), edges[1:].tolist()))
        return Batch(rows if _all(place, chunks) else rows.take(place, pool), token)


def _all(place: Ints, chunks: Ints) -> bool:
    """Whether every row of the chunks is a token that counts."""
    return len(place) == len(chunks) * CHUNK
