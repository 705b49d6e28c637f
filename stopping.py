"""Ctrl-C and SIGTERM as a request that long loops answer between two units of work; twice means now.

And how one process of many ends when another one tells why.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):
    """Raised by `check` after a signal; work that was committed is kept."""

    requested = False

    @classmethod
    def check(cls) -> None:
        if cls.requested:
            raise cls


class EndedByOthers(Exception):
    """Another process of the same job says what happened: end with `code`, and without a word."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM asks to stop, the second interrupts at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if StopRequested.requested:
            raise KeyboardInterrupt
        StopRequested.requested = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        StopRequested.requested = False
        for number, handler in before.items():
            signal.signal(number, handler)
