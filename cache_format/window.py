"""One window in memory: tokens are quantised as they arrive, permuted and encoded when it is full.

Memory is that of the stored numbers before entropy coding (Manifest.bytes_per_token times the window), plus
one shard's bytes for each encoding thread.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import layout
from .codec import (
    Codes,
    Floats,
    dequantise,
    encode_chunk,
    from_bf16_bits,
    quantise,
    to_bf16_bits,
)
from .errors import CacheError
from .manifest import Manifest
from .permutation import permutation
from .shard import build_shard
from .statistics import SiteSums

SINK_RATIO = 50.0
"""A token is a sink where its mlp_out norm at some layer is this many times the window's median there."""

_QUIET = np.errstate(invalid="ignore", over="ignore")
"""bf16 keeps NaN and infinity bit for bit; the statistics then say so, and need not warn."""

Columns = dict[str, npt.NDArray[Any]]


class EncodedFile(NamedTuple):
    path: str
    """relative to the cache"""
    data: bytes


class Window:
    """Room for `manifest.window` tokens of one split."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.tokens = 0
        per_layer = (manifest.n_layers, manifest.window)
        self.columns: Columns = {
            name: np.zeros(manifest.window, column) for name, column in layout.TOKEN_COLUMNS.items()
        }
        self._codes: dict[str, Codes] = {}
        self._scales: dict[str, npt.NDArray[np.float16]] = {}
        self._noise: dict[str, Floats] = {}
        for site in layout.SITES:
            shape = (*per_layer, manifest.d_model)
            int8 = manifest.precision == "int8"
            self._codes[site] = np.empty(shape, np.int8) if int8 else np.empty(shape, np.uint16)
            self._scales[site] = np.empty((*per_layer, manifest.n_blocks), np.float16)
            self._noise[site] = np.zeros(per_layer, np.float32)
        self._norms = np.zeros(per_layer, np.float32)

    @property
    def room(self) -> int:
        return self.manifest.window - self.tokens

    def append(self, columns: Columns, values: dict[str, npt.NDArray[Any]], pool: Executor) -> None:
        """Add tokens; `values[site]` is (token, layer, d_model), float32 or uint16 holding bf16 bits."""
        rows = slice(self.tokens, self.tokens + len(columns["sample"]))
        for name, column in columns.items():
            self.columns[name][rows] = column
        places = [(site, index) for site in layout.SITES for index in range(self.manifest.n_layers)]
        for _ in pool.map(lambda at: self._store(at[0], at[1], rows, values[at[0]]), places):
            pass  # wait for all, and raise what any of them raised
        self.tokens = rows.stop

    @_QUIET
    def _store(self, site: str, index: int, rows: slice, values: npt.NDArray[Any]) -> None:
        given = np.ascontiguousarray(values[:, index])
        true: Floats = from_bf16_bits(given) if given.dtype == np.uint16 else given
        if site == "mlp_out":
            self._norms[index, rows] = np.sqrt(np.einsum("td,td->t", true, true))
        if self.manifest.precision == "bf16":
            self._codes[site][index, rows] = given if given.dtype == np.uint16 else to_bf16_bits(true)
            return
        try:
            codes, scale = quantise(true, self.manifest.step_divisor)
        except CacheError as fault:
            layer = self.manifest.layers[index]
            raise CacheError(f"layer {layer}, {site}: {fault}") from None
        self._codes[site][index, rows], self._scales[site][index, rows] = codes, scale
        lost = dequantise(codes, scale) - true
        self._noise[site][index, rows] = np.einsum("td,td->t", lost, lost)

    @_QUIET
    def seal(self) -> npt.NDArray[np.int64]:
        """Mark the sinks; (token,) group of every token."""
        norms = self._norms[:, : self.tokens]
        high = norms > SINK_RATIO * np.median(norms, axis=1, keepdims=True)
        self.columns["sink"][: self.tokens] = high.any(axis=0)
        group = self.columns["kind"][: self.tokens] + len(layout.KINDS) * self.columns["sink"][: self.tokens]
        return np.asarray(group, np.int64)

    def token_files(self, split: str, window: int) -> Iterator[EncodedFile]:
        order = self._order(window)
        for name, column in self.columns.items():
            chunk = np.zeros_like(column)
            chunk[: self.tokens] = column[order]
            path = layout.window_file(layout.token_array(split, name), window, 1)
            yield EncodedFile(path, encode_chunk(chunk))

    def layer_files(
        self, split: str, window: int, site: str, index: int, group: npt.NDArray[np.int64], sums: SiteSums
    ) -> Iterator[EncodedFile]:
        """Encode one layer of one site, permuted; adds its part to `sums`."""
        order = self._order(window)
        codes = _padded(self._codes[site][index][order])
        scale = _padded(self._scales[site][index][order]) if self.manifest.precision == "int8" else None
        self._add_sums(codes, scale, group[order], sums, index)
        np.add.at(sums.noise[:, index], group, self._noise[site][index, : self.tokens].astype(np.float64))
        arrays = [(layout.values_array(split, site), codes)]
        if scale is not None:
            arrays.append((layout.scale_array(split, site), scale))
        for array, stored in arrays:
            chunks = [encode_chunk(chunk) for chunk in _cut(stored)]
            shard = build_shard(chunks, self.manifest.chunks_per_window)
            yield EncodedFile(layout.shard_file(array, window, index), shard)

    @_QUIET
    def _add_sums(
        self,
        codes: npt.NDArray[Any],
        scale: npt.NDArray[np.float16] | None,
        group: npt.NDArray[np.int64],
        sums: SiteSums,
        index: int,
    ) -> None:
        """Sums of the stored (not the true) values: what a trainer will see."""
        norms, peaks = np.zeros((2, len(group)))
        for start in range(0, len(group), layout.CHUNK):
            rows = slice(start, min(start + layout.CHUNK, len(group)))
            stored = from_bf16_bits(codes[rows]) if scale is None else dequantise(codes[rows], scale[rows])
            # no matrix product here: BLAS would start its own threads inside each of ours
            for present in np.unique(group[rows]):
                chosen = group[rows] == present
                part: npt.NDArray[Any] = stored[chosen]
                if present >= len(layout.KINDS):  # a sink's massive channels swallow the digits of the others
                    part = part.astype(np.float64)
                sums.sum[present, index] += part.sum(axis=0)
                norms[rows][chosen] = np.einsum("td,td->t", part, part)
            peaks[rows] = np.abs(stored).max(axis=1)
        np.add.at(sums.square[:, index], group, norms)
        np.maximum.at(sums.absmax[:, index], group, peaks)

    def _order(self, window: int) -> npt.NDArray[np.int64]:
        """Place on disk -> place of arrival."""
        return permutation(self.tokens, self.manifest.seed, window)


def _padded(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Zero rows up to a whole chunk, as Zarr stores it."""
    missing = -len(rows) % layout.CHUNK
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _cut(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(rows), layout.CHUNK):
        yield rows[start : start + layout.CHUNK]
