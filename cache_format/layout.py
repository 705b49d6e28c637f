"""Names of arrays and files, and the place of every token: pure integers, no disk.

A *window* of tokens is written together; a *shard* is one window of one layer, one file; a *chunk* is
CHUNK tokens of one layer, the unit of decoding.
"""

from typing import Any, Final

import numpy as np

from .errors import CacheError

FORMAT_VERSION: Final = 1
CHUNK: Final = 64
"""Tokens decoded at a time."""
BLOCKS: Final = (32, 64)
"""Channels that may share one scale; a cache has one of the two, and its manifest says which."""
BLOCK: Final = 32
"""In new caches. Half as many neighbours of a massive channel take its coarse step as with 64."""

SITES: Final = ("mlp_in", "mlp_out")
SPLITS: Final = ("train", "val")
KINDS: Final = ("text", "image", "bos", "template")
"""Index = the number stored in token/kind."""
N_GROUPS: Final = 2 * len(KINDS)
"""Statistics are kept apart by kind, and for each kind by sink or not: group = kind + 4 * sink."""

TOKEN_COLUMNS: Final[dict[str, np.dtype[Any]]] = {
    "sample": np.dtype("<i4"),
    "position": np.dtype("<i4"),
    "token_id": np.dtype("<i4"),
    "kind": np.dtype("u1"),
    "row": np.dtype("<i2"),
    "col": np.dtype("<i2"),
    "sink": np.dtype("u1"),
}
STATISTICS: Final = ("sum", "square", "noise", "absmax")

JOURNAL: Final = "journal"
SAMPLES: Final = "samples"
REJECTED: Final = "rejected"


def log_name(log: str, rank: int) -> str:
    """File of one writer's log: `journal.jsonl` for rank 0, `journal-00003.jsonl` for rank 3."""
    return f"{log}.jsonl" if rank == 0 else f"{log}-{rank:05d}.jsonl"


def values_array(split: str, site: str) -> str:
    return f"{split}/{site}"


def scale_array(split: str, site: str) -> str:
    return f"{split}/{site}_scale"


def token_array(split: str, column: str) -> str:
    return f"{split}/token/{column}"


def statistic_array(split: str, site: str, statistic: str) -> str:
    return f"stats/{split}/{site}/{statistic}"


def count_array(split: str) -> str:
    return f"stats/{split}/count"


def shard_file(array: str, window: int, layer_index: int) -> str:
    """Zarr's key of the shard: token axis, layer axis, channel axis."""
    return f"{array}/c.{window}.{layer_index}.0"


def window_file(array: str, window: int, ndim: int) -> str:
    """Zarr's key of an array that has one chunk a window: token columns (1-d) and statistics."""
    return f"{array}/c." + ".".join([str(window), *["0"] * (ndim - 1)])


def window_files(split: str, window: int, n_layers: int, int8: bool) -> list[str]:
    """Every file that one window consists of, relative to the cache."""
    arrays = [values_array(split, site) for site in SITES]
    if int8:
        arrays += [scale_array(split, site) for site in SITES]
    names = [shard_file(array, window, layer) for array in arrays for layer in range(n_layers)]
    names += [window_file(token_array(split, column), window, 1) for column in TOKEN_COLUMNS]
    names.append(window_file(count_array(split), window, 2))
    for site in SITES:
        for statistic in STATISTICS:
            ndim = 4 if statistic == "sum" else 3
            names.append(window_file(statistic_array(split, site, statistic), window, ndim))
    return names


def n_chunks(tokens: int) -> int:
    """Chunks that hold `tokens` tokens; the last may be partly filled."""
    return -(-tokens // CHUNK)


def n_blocks(d_model: int, block: int = BLOCK) -> int:
    """Scales of one vector; the last block may be narrower than the others."""
    return -(-d_model // block)


def block_of(d_model: int, scales: int) -> int:
    """Channels of a block where a vector has so many scales (of a narrow vector's one block: any will do)."""
    return next(block for block in BLOCKS if n_blocks(d_model, block) == scales)


def vector_bytes(d_model: int, int8: bool, block: int = BLOCK) -> int:
    """Of one token's values at one site and layer, before entropy coding."""
    return d_model + 2 * n_blocks(d_model, block) if int8 else 2 * d_model


def parse_layers(text: str | None, held: tuple[int, ...]) -> tuple[int, ...]:
    """Layer numbers of `0-31`, `0,4,8`, `0-31:4` or None (all of `held`); CacheError names what is held."""
    if text is None:
        return held
    chosen: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, dash, last = span.partition("-")
        try:
            numbers = range(int(first), int(last if dash else first) + 1, int(step or 1))
            chosen |= set(numbers[: held[-1] + 2])  # as many as can be held, and one that cannot
        except ValueError:
            raise CacheError(f"--layers: expected such as 0-31, 0,4,8 or 0-31:4, found {text!r}") from None
    if not chosen or not chosen <= set(held):
        raise CacheError(
            f"--layers: expected some of the {len(held)} layers {held[0]} to {held[-1]}, found {text!r}"
        )
    return tuple(sorted(chosen))
