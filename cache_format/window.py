"""One window in memory: tokens are quantised as they arrive. `memory` bounds what a writer holds."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import layout
from .bf16 import Bits, from_bf16_bits, store_bits
from .errors import CacheError
from .int8 import SLAB, Doubles, Floats, Int8s, Measures, Quantised, Scales, check_scale, quantise_into, slabs
from .manifest import Manifest

PORTIONS = 4
"""A thread is asked so often for its part of what arrives: others may be slower."""

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class StoredVectors:
    """Vectors of one site that were quantised elsewhere, as the codec does it; first axes (token, layer)."""

    codes: Int8s
    """(..., d_model)"""
    scale: Scales
    """(..., block)"""
    noise: Floats
    square: Doubles
    peak: Floats
    """As `Measures` says."""

    def __getitem__(self, tokens: slice) -> "StoredVectors":
        return StoredVectors(*(array[tokens] for array in vars(self).values()))


Values = dict[str, npt.NDArray[Any] | StoredVectors]
"""By site, (token, layer, d_model): float32, uint16 holding bf16 bits, or quantised."""


class Quantisers:
    """Threads that share the layers of what arrives, in few portions: most calls have little to do."""

    def __init__(self, threads: int) -> None:
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, "clt-quantise")

    def share(self, n_layers: int, size: int, store: Callable[[str, slice], None]) -> None:
        """`store` all layers of both sites, each of `size` values; wait, and raise what one of them did."""
        some = min(self._threads * PORTIONS, -(-len(layout.SITES) * n_layers * size // SLAB))
        step = -(-n_layers // -(-some // len(layout.SITES)))
        portions = [
            (site, slice(first, min(first + step, n_layers)))
            for site in layout.SITES
            for first in range(0, n_layers, step)
        ]
        if some == 1:
            for portion in portions:
                store(*portion)
            return
        for _ in self._pool.map(lambda portion: store(*portion), portions):
            pass

    def shutdown(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Window:
    """Room for `manifest.window` tokens of one split."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.tokens = 0
        per_layer = (manifest.n_layers, manifest.window)
        self.columns: Columns = {
            name: np.zeros(manifest.window, column) for name, column in layout.TOKEN_COLUMNS.items()
        }
        self._codes: dict[str, Int8s] = {}
        self._scales: dict[str, Scales] = {}
        self.bits: dict[str, Bits] = {}
        """(layer, token, d_model); bf16 only"""
        self._measures: dict[str, Measures] = {}
        for site in layout.SITES:
            shape = (*per_layer, manifest.d_model)
            if manifest.precision == "int8":
                self._codes[site] = np.empty(shape, np.int8)
                self._scales[site] = np.empty((*per_layer, manifest.n_blocks), np.float16)
            else:
                self.bits[site] = np.empty(shape, np.uint16)
            self._measures[site] = Measures(
                np.zeros(per_layer, np.float32), np.zeros(per_layer), np.zeros(per_layer, np.float32)
            )

    def clear(self) -> "Window":
        """Ready for other tokens; its memory stays, for a page of new memory costs as much as encoding it."""
        self.tokens = 0
        return self

    @property
    def room(self) -> int:
        return self.manifest.window - self.tokens

    @property
    def places(self) -> list[tuple[str, int]]:
        """Sites and layers: what threads share among them."""
        return [(site, index) for site in layout.SITES for index in range(self.manifest.n_layers)]

    def append(self, columns: Columns, values: Values, threads: Quantisers) -> None:
        """Add tokens."""
        rows = slice(self.tokens, self.tokens + len(columns["sample"]))
        for name, column in columns.items():
            self.columns[name][rows] = column
        size = (rows.stop - rows.start) * self.manifest.d_model
        threads.share(
            self.manifest.n_layers, size, lambda site, some: self._store(site, some, rows, values[site])
        )
        self.tokens = rows.stop

    def quantised(self, site: str, index: int, tokens: slice) -> Quantised:
        """int8 only."""
        return Quantised(self._codes[site][index, tokens], self._scales[site][index, tokens])

    def measures(self, site: str, index: int, tokens: slice) -> Measures:
        noise, square, peak = self._measures[site]
        return Measures(noise[index, tokens], square[index, tokens], peak[index, tokens])

    def squares(self, site: str) -> Doubles:
        """(layer, token): squared norms, as stored."""
        return self._measures[site].square[:, : self.tokens]

    def _store(self, site: str, layers: slice, rows: slice, values: npt.NDArray[Any] | StoredVectors) -> None:
        if isinstance(values, StoredVectors):
            self._keep(site, layers, rows, values)
            return
        for index in range(layers.start, layers.stop):
            try:
                for part in slabs(len(values), self.manifest.d_model):
                    at = slice(rows.start + part.start, rows.start + part.stop)
                    self._store_slab(site, index, at, values[part, index])
            except CacheError as fault:
                raise self._at(site, index, fault) from None

    def _store_slab(self, site: str, index: int, at: slice, values: npt.NDArray[Any]) -> None:
        measures = self.measures(site, index, at)
        if self.manifest.precision == "bf16":
            store_bits(self.bits[site][index, at], values, measures.square, measures.peak)
        else:
            true = from_bf16_bits(values) if values.dtype == np.uint16 else values
            quantise_into(self.quantised(site, index, at), true, self.manifest.step_divisor, measures)

    def _keep(self, site: str, layers: slice, rows: slice, given: StoredVectors) -> None:
        """All layers at once: one alone is little work where samples are short."""
        try:
            check_scale(given.scale[:, layers])
        except CacheError as fault:
            sound = np.isfinite(given.scale[:, layers]).all(axis=(0, 2))
            raise self._at(site, layers.start + int(np.argmin(sound)), fault) from None
        noise, square, peak = self._measures[site]
        for to, array in (
            (self._codes[site], given.codes),
            (self._scales[site], given.scale),
            (noise, given.noise),
            (square, given.square),
            (peak, given.peak),
        ):
            to[layers, rows] = array[:, layers].swapaxes(0, 1)

    def _at(self, site: str, index: int, fault: CacheError) -> CacheError:
        return CacheError(f"layer {self.manifest.layers[index]}, {site}: {fault}")


def memory(manifest: Manifest, threads: int) -> int:
    """Bytes that a writer with `threads` threads holds at most, its list of samples and the caller's values
    aside:

        3 windows (two splits fill, one is written): window * (bytes_per_token + n_layers * 32 + 18)
        each thread: 4 * CHUNK * d_model * bytes a value (a chunk and its parts) + 24 * SLAB
        5 sums (two splits, two sites, one being encoded): 8 groups * n_layers * d_model * 8
    """
    value = 1 if manifest.precision == "int8" else 2
    columns = sum(dtype.itemsize for dtype in layout.TOKEN_COLUMNS.values())
    of_token = manifest.bytes_per_token + manifest.n_layers * 32 + columns
    chunk = layout.CHUNK * manifest.d_model * value
    sums = layout.N_GROUPS * manifest.n_layers * manifest.d_model * 8
    return 3 * manifest.window * of_token + threads * (4 * chunk + 24 * SLAB) + 5 * sums
