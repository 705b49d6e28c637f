"""What each thread keeps for itself: zstd's contexts, which take longer to make than a small frame takes."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class PerThread(Generic[Made]):
    """Call it for the calling thread's own, which `make` makes when it is first asked for."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make, self._local = make, threading.local()

    def __call__(self) -> Made:
        if not hasattr(self._local, "made"):
            self._local.made = self._make()
        made: Made = self._local.made
        return made
