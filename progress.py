"""A progress bar on a terminal, a plain line every few seconds where there is none."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units of work on stderr; `total` may be unknown. leave=False: no trace is left at the end.

    quiet: nothing is shown at all.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        leave: bool = True,
        quiet: bool = False,
    ) -> None:
        self._name, self._total, self._unit, self._quiet = name, total, unit, quiet
        self._leave = leave
        self._done = self._started_at = done
        self._note = ""
        self._began = self._last_line = time.monotonic()
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                desc=name,
                unit=unit,
                unit_scale=True,
                dynamic_ncols=True,
                leave=leave,
            )
            if sys.stderr.isatty() and not quiet
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._leave and self._done > self._started_at:
            self._line(f", took {_time(time.monotonic() - self._began)}")

    @property
    def rate(self) -> float:
        """Units a second, since the start."""
        return (self._done - self._started_at) / max(1e-9, time.monotonic() - self._began)

    def add(self, units: int, note: str = "") -> None:
        self._done, self._note = self._done + units, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            left = (self._total - self._done) / self.rate if self._total and self.rate else None
            self._line("" if left is None else f", {_time(left)} left")

    def advance_to(self, done: int, note: str = "") -> None:
        """As `add`, told how far the work is."""
        self.add(done - self._done, note)

    def _line(self, time_text: str) -> None:
        if self._quiet:
            return
        self._last_line = time.monotonic()
        of = f"/{self._total}" if self._total else ""
        rate = f"{self.rate:.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        text = f"{self._name}: {self._done}{of} {self._unit}, {rate} {self._unit}/s{time_text}"
        print(f"{text}, {self._note}" if self._note else text, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    """As 40 s, 12 min 30 s or 5 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, whole = divmod(minutes, 60)
    if hours:
        return f"{hours} h {whole:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
