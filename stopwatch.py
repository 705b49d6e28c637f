"""Where the time went: seconds by name, over all threads; what one block measures, no other counts."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time until the end of the block, less what blocks inside count, under `name`."""
        outside = getattr(self._local, "inside", 0.0)
        self._local.inside, began = 0.0, time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self.seconds[name] += took - self._local.inside
            self._local.inside = outside + took

    def count(self, name: str, took: float) -> None:
        """Seconds that this thread measured by itself, as if a block had."""
        with self._lock:
            self.seconds[name] += took
        self._local.inside = getattr(self._local, "inside", 0.0) + took
