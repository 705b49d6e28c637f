"""The zarr.json documents: a pure function of the manifest and of how many tokens the journal committed.

They are written for readers that know Zarr and not us; our own reader needs only the root's `clt` attribute.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import codec, layout
from .manifest import Manifest

ROOT = "zarr.json"

Extent = tuple[int, int]
"""(tokens, windows) of a split: the arrays' length on the token axis, and the number of windows."""


def documents(manifest: Manifest, extents: dict[str, Extent]) -> dict[str, bytes]:
    """Every zarr.json of the cache, by path relative to its root."""
    found = {ROOT: _group({"clt": manifest.to_json()}), "stats/zarr.json": _group({})}
    for split in layout.SPLITS:
        for group in (split, f"{split}/token", f"stats/{split}"):
            found[f"{group}/zarr.json"] = _group({})
        for name, document in _arrays(manifest, split, *extents[split]):
            found[f"{name}/zarr.json"] = _json(document)
        for site in layout.SITES:
            found[f"stats/{split}/{site}/zarr.json"] = _group({})
    return found


def _arrays(
    manifest: Manifest, split: str, tokens: int, windows: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    layers, width, window = manifest.n_layers, manifest.d_model, manifest.window
    token_axes = ["token", "layer", "channel"]
    int8 = manifest.precision == "int8"
    for site in layout.SITES:
        yield (
            layout.values_array(split, site),
            _sharded([tokens, layers, width], window, "int8" if int8 else "uint16", token_axes),
        )
        if int8:
            shape = [tokens, layers, manifest.n_blocks]
            yield (
                layout.scale_array(split, site),
                _sharded(shape, window, "float16", [*token_axes[:2], "block"]),
            )
        for statistic in layout.STATISTICS:
            shape = [windows, layout.N_GROUPS, layers] + [width] * (statistic == "sum")
            axes = ["window", "group", "layer", "channel"][: len(shape)]
            yield layout.statistic_array(split, site, statistic), _plain(shape, 1, "float64", axes)
    yield layout.count_array(split), _plain([windows, layout.N_GROUPS], 1, "int64", ["window", "group"])
    for column, dtype in layout.TOKEN_COLUMNS.items():
        yield layout.token_array(split, column), _plain([tokens], window, dtype.name, ["token"])


def _group(attributes: dict[str, Any]) -> bytes:
    return _json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _plain(shape: list[int], first: int, dtype: str, axes: list[str]) -> dict[str, Any]:
    """One zstd chunk for every `first` steps of the first axis."""
    codecs = [_bytes_codec(dtype), codec.ZSTD_JSON]
    return _array(shape, [first, *shape[1:]], dtype, axes, codecs)


def _sharded(shape: list[int], window: int, dtype: str, axes: list[str]) -> dict[str, Any]:
    """One file a (window, layer), cut into chunks of CHUNK tokens; index last, chunks in token order."""
    compress = [codec.BLOSC_JSON, codec.CRC32C_JSON] if dtype == "uint16" else [codec.ZSTD_JSON]
    sharding = {
        "chunk_shape": [layout.CHUNK, 1, shape[2]],
        "codecs": [_bytes_codec(dtype), *compress],
        "index_codecs": [codec.BYTES_JSON, codec.CRC32C_JSON],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array(shape, [window, 1, shape[2]], dtype, axes, codecs)


def _bytes_codec(dtype: str) -> dict[str, Any]:
    return codec.ONE_BYTE_JSON if np.dtype(dtype).itemsize == 1 else codec.BYTES_JSON


def _array(
    shape: list[int], chunk: list[int], dtype: str, axes: list[str], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": codecs,
        "dimension_names": axes,
        "attributes": {},
    }


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()
