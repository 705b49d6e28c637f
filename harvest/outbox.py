"""What goes to the writer, in order: by a thread of its own, while a device computes the next batch.

Where the model runs on the processor there is nothing that would be idle meanwhile. Its threads wait for each
other many times a layer, so one that is pushed aside by ours holds up all of them: there it is done at once.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

MOST_BATCHES = 2
"""Batches of activations that wait or are being stored; whoever brings another one waits."""


class Outbox:
    """Everything that touches the writer goes through here, so that its order is that of the samples.

    Behind a job that failed no other is done: the cache would have a gap.
    """

    def __init__(self, beside: bool = True) -> None:
        """beside: in another thread than the caller's."""
        self.beside = beside
        self._thread = ThreadPoolExecutor(1, "clt-store")
        self._batches: deque[Future[None]] = deque()
        self._notes: deque[Future[None]] = deque()
        self._fault: BaseException | None = None

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put_batch(self, store: Callable[[], None]) -> None:
        """Store later; waits while MOST_BATCHES are not stored, and raises what storing raised."""
        if not self.beside:
            self._do(store)
            return
        while len(self._batches) >= MOST_BATCHES:
            self._batches.popleft().result()
        self._batches.append(self._thread.submit(self._do, store))

    def put_note(self, write: Callable[[], None]) -> None:
        """Write later something that takes no time and no memory."""
        if not self.beside:
            self._do(write)
            return
        while self._notes and self._notes[0].done():
            self._notes.popleft().result()
        self._notes.append(self._thread.submit(self._do, write))

    def _do(self, job: Callable[[], None]) -> None:
        if self._fault is not None:
            raise self._fault
        try:
            job()
        except BaseException as fault:
            self._fault = fault
            raise

    def drain(self) -> None:
        """Wait until all is stored."""
        for jobs in (self._batches, self._notes):
            while jobs:
                jobs.popleft().result()
