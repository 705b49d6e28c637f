"""One split as a writer sees it: what is committed, what is being filled, and the sums so far."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout
from .journal import WindowEntry
from .manifest import Manifest
from .statistics import SiteSums
from .stored import read_site_sums
from .window import Window


@dataclass
class Stream:
    """Where one split of one writer stands."""

    sums: dict[str, SiteSums]
    sealed: int = 0
    """Tokens handed to the encoder or committed."""
    committed: int = 0
    """Tokens in the journal."""
    windows: int = 0
    """Windows handed to the encoder or committed."""
    cursor: int = 0
    """The producer's cursor of what was added last."""
    since_cursor: int = 0
    """Tokens added since that cursor."""
    to_skip: int = 0
    """Tokens that a resumed producer delivers again and that are committed already."""
    count: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(layout.N_GROUPS, np.int64))
    filling: Window | None = None

    @classmethod
    def restored(cls, folder: Path, manifest: Manifest, committed: list[WindowEntry]) -> "Stream":
        """Stand where the last committed window left off."""
        stream = cls({site: SiteSums.zeros(manifest.n_layers, manifest.d_model) for site in layout.SITES})
        if committed:
            last = committed[-1]
            stream.sealed = stream.committed = sum(entry.tokens for entry in committed)
            stream.windows = len(committed)
            stream.cursor, stream.to_skip = last.cursor, last.skip
            stream.sums, stream.count = read_site_sums(folder, manifest, last.split, last.window)
        return stream

    @property
    def added(self) -> int:
        """Tokens taken in, committed or not."""
        return self.sealed + (self.filling.tokens if self.filling else 0)

    def at_cursor(self, cursor: int) -> None:
        """The producer delivers from `cursor` now."""
        if cursor != self.cursor:
            self.cursor, self.since_cursor = cursor, 0

    def skip(self, tokens: int) -> int:
        """How many of the next `tokens` tokens are committed already; they count as delivered."""
        skipped = min(self.to_skip, tokens)
        self.to_skip -= skipped
        self.since_cursor += skipped
        return skipped

    def statistics(self, split: str, window: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Paths and arrays of the sums up to and including `window`."""
        yield layout.window_file(layout.count_array(split), window, 2), self.count
        for site in layout.SITES:
            for statistic in layout.STATISTICS:
                array = getattr(self.sums[site], statistic)
                name = layout.statistic_array(split, site, statistic)
                yield layout.window_file(name, window, 1 + array.ndim), array
