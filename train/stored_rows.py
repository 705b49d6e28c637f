"""Stored numbers of some tokens, side by side: what a buffer and a batch consist of."""

from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .order import Ints


class Rows(NamedTuple):
    """Stored numbers of some tokens."""

    codes: dict[str, npt.NDArray[Any]]
    """by site: (layer, token, d_model) int8, or uint16 holding bf16 bits"""
    scales: dict[str, npt.NDArray[np.float16]]
    """by site: (layer, token, block); without meaning for bf16"""

    def room(self, n_tokens: int) -> "Rows":
        """Uninitialised rows for n_tokens other tokens of the same layers and widths."""

        def like(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.empty((array.shape[0], n_tokens, array.shape[2]), array.dtype)

        return Rows(*({site: like(array) for site, array in part.items()} for part in self))

    def copy(self, places: Ints, out: "Rows", start: int, pool: Executor) -> None:
        """Copy the tokens at `places` to `out`, side by side from `start`; a task for each site and layer."""
        pairs = [(part[site], to[site]) for part, to in zip(self, out, strict=True) for site in self.codes]
        tasks = [(array[layer], to[layer]) for array, to in pairs for layer in range(len(array))]

        def gather(task: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> None:
            array, to = task
            # places are in range; mode "raise" would copy everything once more
            np.take(array, places, axis=0, out=to[start : start + len(places)], mode="clip")

        list(pool.map(gather, tasks))

    def take(self, places: Ints, pool: Executor) -> "Rows":
        """Copies of the tokens at `places`."""
        out = self.room(len(places))
        self.copy(places, out, 0, pool)
        return out
