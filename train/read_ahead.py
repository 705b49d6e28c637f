"""Open shards and ask for their bytes in some threads, decode them in others, and never too many at once."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from ..cache_format.open_shards import Fetched, InWindow, files_at_a_time

FETCHERS = 8
"""Threads that open shards and ask the kernel for chunks before they are decoded; they wait for the disk."""
FEW = 2
"""Of them where the kernel had all that the last buffer took: more would only take the decoders' turns."""
WINDOWS_AT_ONCE = 8
"""Windows of which one task has the shards open, codes and scales."""


class Portion(NamedTuple):
    """Some of the chunks that are wanted, of one site and layer, one cache, and WINDOWS_AT_ONCE windows."""

    cache: int
    site: str
    layer: int
    """Place in the buffers"""
    chunks: list[InWindow]


def read_ahead(
    portions: Iterable[Portion],
    fetch: Callable[[Portion], Fetched],
    decode: Callable[[Portion, Fetched], None],
    pool: Executor,
    fetchers: int = FETCHERS,
) -> None:
    """Fetch each portion, then decode it in `pool`; where one fails, none runs on when this raises."""

    def decode_fetched(portion: Portion, fetched: Future[Fetched]) -> None:
        decode(portion, fetched.result())

    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(fetchers, "clt-fetch") as fetching:
        try:
            for portion in portions:
                if len(running) == portions_at_a_time():
                    running.popleft().result()
                running.append(pool.submit(decode_fetched, portion, fetching.submit(fetch, portion)))
            while running:
                running.popleft().result()
        finally:
            fetching.shutdown(wait=False, cancel_futures=True)
            wait([future for future in running if not future.cancel()])


def portions_at_a_time() -> int:
    """From when their shards are opened until they are decoded, so that not too many files are open."""
    return max(1, files_at_a_time() // (2 * WINDOWS_AT_ONCE))
