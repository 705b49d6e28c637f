"""One window in memory: tokens are quantised as they arrive, permuted and encoded when it is full.

What is asked of every value is asked a slab or a chunk at a time, while it lies in the processor's cache: the
statistics then cost a fraction of the encoding. `memory` bounds what all this holds.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import layout
from .codec import (
    SLAB,
    Codes,
    Floats,
    check_scale,
    encode_chunk,
    from_bf16_bits,
    quantise_slab,
    slab_from_bf16_bits,
    slabs,
    to_bf16_bits,
)
from .errors import CacheError
from .manifest import Manifest
from .permutation import permutation
from .shard import build_shard
from .statistics import Doubles, SiteSums

SINK_RATIO = 50.0
"""A token is a sink where its mlp_out norm at some layer is this many times the window's median there."""

_QUIET = np.errstate(invalid="ignore", over="ignore")
"""bf16 keeps NaN and infinity bit for bit; the statistics then say so, and need not warn."""

Columns = dict[str, npt.NDArray[Any]]


class EncodedFile(NamedTuple):
    path: str
    """relative to the cache"""
    data: bytes | memoryview
    """of a shard: until this thread encodes the next"""


@dataclass(frozen=True)
class StoredVectors:
    """Vectors of one site that were quantised elsewhere, as the codec does it; first axes (token, layer)."""

    codes: npt.NDArray[np.int8]
    """(..., d_model)"""
    scale: npt.NDArray[np.float16]
    """(..., block)"""
    noise: Floats
    """Squared distance of the stored from the true vector."""
    square: Doubles
    """Squared norm, as stored."""
    peak: Floats
    """Largest size of a value, as stored."""

    def __getitem__(self, tokens: slice) -> "StoredVectors":
        return StoredVectors(*(array[tokens] for array in vars(self).values()))


Values = dict[str, npt.NDArray[Any] | StoredVectors]
"""By site, (token, layer, d_model): float32, uint16 holding bf16 bits, or quantised."""


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
        # of each vector: squared distance of the stored from the true one; square and largest size, as stored
        self._noise: dict[str, Floats] = {}
        self._square: dict[str, Doubles] = {}
        self._peak: dict[str, Floats] = {}
        for site in layout.SITES:
            shape = (*per_layer, manifest.d_model)
            int8 = manifest.precision == "int8"
            self._codes[site] = np.empty(shape, np.int8) if int8 else np.empty(shape, np.uint16)
            self._scales[site] = np.empty((*per_layer, manifest.n_blocks), np.float16)
            self._noise[site] = np.zeros(per_layer, np.float32)
            self._square[site] = np.zeros(per_layer, np.float64)
            self._peak[site] = np.zeros(per_layer, np.float32)

    def clear(self) -> "Window":
        """Ready for other tokens; its memory stays, for a page of new memory costs as much as encoding it."""
        self.tokens = 0
        return self

    @property
    def room(self) -> int:
        return self.manifest.window - self.tokens

    def append(self, columns: Columns, values: Values, pool: Executor) -> None:
        """Add tokens."""
        rows = slice(self.tokens, self.tokens + len(columns["sample"]))
        for name, column in columns.items():
            self.columns[name][rows] = column
        places = [(site, index) for site in layout.SITES for index in range(self.manifest.n_layers)]
        for _ in pool.map(lambda at: self._store(at[0], at[1], rows, values[at[0]]), places):
            pass  # wait for all, and raise what any of them raised
        self.tokens = rows.stop

    @_QUIET
    def _store(self, site: str, index: int, rows: slice, values: npt.NDArray[Any] | StoredVectors) -> None:
        if isinstance(values, StoredVectors):
            self._keep(site, index, rows, values)
            return
        for part in slabs(len(values), self.manifest.d_model):
            given = np.ascontiguousarray(values[part, index])
            at = slice(rows.start + part.start, rows.start + part.stop)
            as_bits = given.dtype == np.uint16
            if self.manifest.precision == "bf16":
                codes = self._codes[site][index, at].view(np.uint16)
                if as_bits:
                    codes[...] = given
                else:
                    to_bf16_bits(given, out=codes)
                self._measure_bits(site, index, at, codes)
            else:
                self._quantise(site, index, at, from_bf16_bits(given) if as_bits else given)

    def _quantise(self, site: str, index: int, at: slice, true: Floats) -> None:
        scale = self._scales[site][index, at]
        codes = self._codes[site][index, at].view(np.int8)
        try:
            steps = quantise_slab(true, self.manifest.step_divisor, codes, scale)
        except CacheError as fault:
            raise self._fault(site, index, fault) from None
        area = np.square(steps.step, dtype=np.float64)
        self._peak[site][index, at] = (steps.peak * steps.step).max(axis=1)
        self._square[site][index, at] = _squares(steps.rounded, area)
        lost = np.subtract(steps.rounded, steps.exact, out=steps.exact)
        self._noise[site][index, at] = _squares(lost, area)

    def _keep(self, site: str, index: int, rows: slice, given: StoredVectors) -> None:
        assert self.manifest.precision == "int8"
        scale = given.scale[:, index]
        try:
            check_scale(scale)
        except CacheError as fault:
            raise self._fault(site, index, fault) from None
        self._codes[site][index, rows] = given.codes[:, index]
        self._scales[site][index, rows] = scale
        self._noise[site][index, rows] = given.noise[:, index]
        self._square[site][index, rows] = given.square[:, index]
        self._peak[site][index, rows] = given.peak[:, index]

    def _fault(self, site: str, index: int, fault: CacheError) -> CacheError:
        return CacheError(f"layer {self.manifest.layers[index]}, {site}: {fault}")

    def _measure_bits(self, site: str, index: int, at: slice, bits: npt.NDArray[np.uint16]) -> None:
        stored = slab_from_bf16_bits(bits)
        largest = (bits & np.uint16(0x7FFF)).max(axis=1)  # a NaN is larger than all numbers
        peak = from_bf16_bits(largest)
        square = np.einsum("td,td->t", stored, stored).astype(np.float64)
        massive = ~(
            4 * np.square(peak) < square
        )  # one channel swallows the digits of the others, or overflows
        few = stored[massive].astype(np.float64)
        square[massive] = np.einsum("td,td->t", few, few)
        self._peak[site][index, at], self._square[site][index, at] = peak, square

    @_QUIET
    def seal(self) -> npt.NDArray[np.int64]:
        """Mark the sinks; (token,) group of every token."""
        norms = np.sqrt(self._square["mlp_out"][:, : self.tokens])
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
        self._add_sums(site, index, group, sums)
        arrays = [(layout.values_array(split, site), self._codes[site][index])]
        if self.manifest.precision == "int8":
            arrays.append((layout.scale_array(split, site), self._scales[site][index]))
        for array, rows in arrays:
            chunks = [encode_chunk(_padded(rows[part])) for part in _cut(order)]
            shard = build_shard(chunks, self.manifest.chunks_per_window)
            yield EncodedFile(layout.shard_file(array, window, index), shard)

    @_QUIET
    def _add_sums(self, site: str, index: int, group: npt.NDArray[np.int64], sums: SiteSums) -> None:
        """Sums of the stored (not the true) values: what a trainer will see."""
        tokens = slice(self.tokens)
        noise = self._noise[site][index, tokens].astype(np.float64)
        np.add.at(sums.noise[:, index], group, noise)
        np.add.at(sums.square[:, index], group, self._square[site][index, tokens])
        np.maximum.at(sums.absmax[:, index], group, self._peak[site][index, tokens])
        for present in np.unique(group):
            for part in _cut(np.flatnonzero(group == present)):
                # a sink's massive channels swallow the digits of the others
                exact = np.float64 if present >= len(layout.KINDS) else np.float32
                sums.sum[present, index] += self._sum(site, index, part, np.dtype(exact))

    def _sum(
        self, site: str, index: int, rows: npt.NDArray[np.int64], exact: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        """(d_model,): sum of stored vectors. No matrix product: BLAS would start threads in each of ours."""
        codes = self._codes[site][index][rows]
        if codes.dtype == np.uint16:
            return np.asarray(from_bf16_bits(codes).sum(axis=0, dtype=exact))
        whole = codes.shape[1] // layout.BLOCK
        cut = whole * layout.BLOCK
        scale, numbers = self._scales[site][index][rows].astype(exact), codes.astype(exact)
        blocks = numbers[:, :cut].reshape(len(rows), whole, layout.BLOCK)
        parts = [np.einsum("tb,tbc->bc", scale[:, :whole], blocks).ravel()]
        if cut < codes.shape[1]:
            parts.append(np.einsum("t,tc->c", scale[:, whole], numbers[:, cut:]))
        return np.concatenate(parts)

    def _order(self, window: int) -> npt.NDArray[np.int64]:
        """Place on disk -> place of arrival."""
        return permutation(self.tokens, self.manifest.seed, window)


def memory(manifest: Manifest, threads: int) -> int:
    """Bytes that a writer with `threads` threads holds at most, its list of samples and the caller's values
    aside:

        3 windows (two splits fill, one is written): window * (bytes_per_token + n_layers * 32 + 18)
        each thread: 2 * window * d_model * bytes a value (a shard and its parts) + 24 * SLAB
        5 sums (two splits, two sites, one being encoded): 8 groups * n_layers * d_model * 8
    """
    value = 1 if manifest.precision == "int8" else 2
    columns = sum(dtype.itemsize for dtype in layout.TOKEN_COLUMNS.values())
    of_token = manifest.bytes_per_token + manifest.n_layers * 32 + columns
    shard = manifest.window * manifest.d_model * value
    sums = layout.N_GROUPS * manifest.n_layers * manifest.d_model * 8
    return 3 * manifest.window * of_token + threads * (2 * shard + 24 * SLAB) + 5 * sums


def _squares(blocks: Floats, area: Doubles) -> Doubles:
    """(token,): squared norms of vectors in units of their steps; area (token, block): squared steps."""
    squares = np.einsum("tbc,tbc->tb", blocks, blocks)
    return np.asarray((squares * area).sum(axis=1))


def _padded(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Zero rows up to a whole chunk, as Zarr stores it."""
    missing = -len(rows) % layout.CHUNK
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


def _cut(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(rows), layout.CHUNK):
        yield rows[start : start + layout.CHUNK]
