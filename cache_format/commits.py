"""Windows on their way to the disk, in order: one is encoded while the one before is synced and committed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..stopwatch import Stopwatch
from .encoders import Written, discard


class _Window(NamedTuple):
    encoding: Future[Written]
    commit: Future[None]


class Commits:
    """Of one writer. Behind a window that failed no other is committed: the cache would have a gap."""

    def __init__(self, watch: Stopwatch) -> None:
        """watch: told what a caller waits for: wait encoded, wait synced."""
        self._watch = watch
        self._encoder = ThreadPoolExecutor(1, "clt-window")
        self._committer = ThreadPoolExecutor(1, "clt-commit")
        self._pending: deque[_Window] = deque()

    def put(self, encode: Callable[[], Written], commit: Callable[[Written], None]) -> None:
        """Encode, then commit; waits until the window before is encoded and the one before that committed."""
        self.wait_encoded()
        self._wait_committed(but=1)
        before = self._pending[-1].commit if self._pending else None
        encoding = self._encoder.submit(encode)
        self._pending.append(_Window(encoding, self._committer.submit(_commit, encoding, before, commit)))

    def wait_encoded(self) -> None:
        """Raises what encoding raised."""
        with self._watch.measure("wait encoded"):
            for window in self._pending:
                window.encoding.result()

    def wait(self) -> None:
        """Until all are committed; raises what went wrong first."""
        self.wait_encoded()
        self._wait_committed(but=0)

    def shutdown(self) -> None:
        """What is on its way is waited for."""
        self._encoder.shutdown()
        self._committer.shutdown()

    def _wait_committed(self, but: int) -> None:
        with self._watch.measure("wait synced"):
            while len(self._pending) > but:
                self._pending.popleft().commit.result()


def _commit(
    encoding: Future[Written], before: Future[None] | None, commit: Callable[[Written], None]
) -> None:
    written = encoding.result()
    fault = before.exception() if before is not None else None
    if fault is not None:
        discard(written)
        raise fault
    commit(written)
