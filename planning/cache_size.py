"""How many bytes a cache takes: its layout, exactly, and what entropy coding leaves, as measured."""

import math
from typing import NamedTuple

from ..cache_format import Cache
from ..cache_format.layout import CHUNK, N_GROUPS, SITES, SPLITS, TOKEN_COLUMNS, n_blocks
from ..cache_format.shard import index_bytes

COLUMNS = sum(dtype.itemsize for dtype in TOKEN_COLUMNS.values())


class Coded(NamedTuple):
    """What is left after entropy coding; shard indexes are counted apart."""

    code_bits: float
    """Of a value: an int8 code at step divisor 8, or the 16 bits of bf16."""
    scale_bits: float
    """Of the scales, for each of a new cache's blocks; 0 for bf16."""
    column_share: float
    """Of the token table's bytes."""
    sums_share: float
    """Of the statistics' bytes."""


TYPICAL = {
    "int8": Coded(code_bits=5.191, scale_bits=1.68, column_share=0.27, sums_share=0.266),
    "bf16": Coded(code_bits=10.85, scale_bits=0.0, column_share=0.270, sums_share=0.265),
}
"""As `measure_coded` finds them in caches of the demo's model; tests/test_plan_measured.py holds them."""


class CacheSize(NamedTuple):
    """What decides a cache's bytes."""

    n_layers: int
    d_model: int
    precision: str = "int8"
    step_divisor: float = 8.0
    window: int = 16384


class CacheBytes(NamedTuple):
    """Bytes of committed files, as `clt info` counts them."""

    codes: int
    scales: int
    indexes: int
    token_table: int
    statistics: int

    @property
    def total(self) -> int:
        return sum(self)


def cache_bytes(size: CacheSize, tokens: int, coded: Coded | None = None) -> CacheBytes:
    """Of one split with `tokens` tokens, written by one process.

    The step's logarithm is that of a code's entropy: half the step costs one bit more.
    """
    coded = coded or TYPICAL[size.precision]
    vectors = len(SITES) * size.n_layers * tokens
    int8 = size.precision == "int8"
    bits = coded.code_bits + (math.log2(size.step_divisor / 8) if int8 else 0)
    return CacheBytes(
        codes=round(vectors * size.d_model * bits / 8) + _empty_bytes(size, -tokens % CHUNK),
        scales=round(vectors * n_blocks(size.d_model) * coded.scale_bits / 8) if int8 else 0,
        indexes=_n_windows(size, tokens) * layer_index_bytes(size) * size.n_layers,
        token_table=round(tokens * COLUMNS * coded.column_share),
        statistics=round(_n_windows(size, tokens) * _sums_bytes(size) * coded.sums_share),
    )


def layer_bytes(size: CacheSize, tokens: int, coded: Coded | None = None) -> float:
    """What reading one layer of all tokens takes from disk."""
    found = cache_bytes(size, tokens, coded)
    return (found.codes + found.scales + found.indexes) / size.n_layers


def layer_index_bytes(size: CacheSize) -> int:
    """Of all shards of one window and layer."""
    shards = len(SITES) * (2 if size.precision == "int8" else 1)
    return shards * index_bytes(size.window // CHUNK)


def measure_coded(cache: Cache) -> Coded:
    """What entropy coding left in a cache; ValueError where it has no tokens yet."""
    manifest = cache.manifest
    size = CacheSize(
        manifest.n_layers, manifest.d_model, manifest.precision, manifest.step_divisor, manifest.window
    )
    parts = _bytes_by_part(cache)
    tokens = sum(len(cache[split]) for split in SPLITS)
    if not tokens:
        raise ValueError(f"{cache.path} has no tokens yet; let the harvest commit a window first")
    windows = len(cache.windows)
    int8 = manifest.precision == "int8"
    index = windows * manifest.n_layers * len(SITES) * index_bytes(manifest.chunks_per_window)
    vectors = len(SITES) * manifest.n_layers * tokens
    empty = _empty_bytes(size, sum(-entry.tokens % CHUNK for entry in cache.windows))
    bits = 8 * (parts["codes"] - index - empty) / (vectors * manifest.d_model)
    return Coded(
        code_bits=bits - (math.log2(manifest.step_divisor / 8) if int8 else 0),
        scale_bits=8 * (parts["scales"] - index) / (vectors * n_blocks(manifest.d_model)) if int8 else 0.0,
        column_share=parts["token"] / (tokens * COLUMNS),
        sums_share=parts["stats"] / (windows * _sums_bytes(size)),
    )


def _n_windows(size: CacheSize, tokens: int) -> int:
    return -(-tokens // size.window)


def _empty_bytes(size: CacheSize, rows: int) -> int:
    """Of the rows that fill a split's last chunk: bf16's lower bytes, which are stored as they are."""
    return len(SITES) * size.n_layers * size.d_model * rows if size.precision == "bf16" else 0


def _sums_bytes(size: CacheSize) -> int:
    """Of a window's statistics before coding: the sums of vectors, beside which the rest is nothing."""
    return len(SITES) * N_GROUPS * size.n_layers * size.d_model * 8


def _bytes_by_part(cache: Cache) -> dict[str, int]:
    parts = dict.fromkeys(("codes", "scales", "token", "stats"), 0)
    for entry in cache.windows:
        for name, file in entry.files.items():
            group, array = name.split("/")[:2]
            if group == "stats":
                part = "stats"
            elif array == "token":
                part = "token"
            else:
                part = "scales" if array.endswith("_scale") else "codes"
            parts[part] += file.size
    return parts
