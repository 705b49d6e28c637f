"""Where a token comes from, as far as the cache itself knows: no dataset, no tokenizer."""

from typing import Any

import numpy as np

from . import layout
from .errors import CacheError
from .reader import Cache
from .stored import read_array


def trace_token(cache: Cache, split: str, number: int) -> dict[str, Any]:
    """Token `number` of a split, in the order on disk: its columns, its sample, and its patch.

    Keys: split, token, window, sample, id, dataset_row, position, token_id, kind, sink, length, cut, and
    image (None for tokens outside of pictures): file, sha256, size, row, col, tile (number of the grid that
    the token is in, None between grids), tiles (how many there are), rectangle (see patch_rectangle).
    """
    chosen = cache[split]
    if not 0 <= number < len(chosen):
        raise CacheError(f"--token: split {split} has tokens 0 to {len(chosen) - 1}, found {number}")
    ends = np.cumsum([entry.tokens for entry in chosen.entries])
    nth = int(np.searchsorted(ends, number, side="right"))
    entry = chosen.entries[nth]
    place = number - int(ends[nth] - entry.tokens)
    columns = {
        name: int(
            read_array(
                cache.path,
                layout.window_file(layout.token_array(split, name), entry.window, 1),
                (cache.manifest.window,),
                dtype,
            )[place]
        )
        for name, dtype in layout.TOKEN_COLUMNS.items()
    }
    line = cache.samples().get(columns["sample"], {})
    return {
        "split": split,
        "token": number,
        "window": entry.window,
        "sample": columns["sample"],
        "id": line.get("id"),
        "dataset_row": line.get("row"),
        "position": columns["position"],
        "token_id": columns["token_id"],
        "kind": layout.KINDS[columns["kind"]],
        "sink": bool(columns["sink"]),
        "length": line.get("length"),
        "cut": line.get("cut"),
        "image": _image(line, columns),
    }


def _image(line: dict[str, Any], columns: dict[str, int]) -> dict[str, Any] | None:
    """The picture whose tokens span the position, and the patch's part of it."""
    place = {name: columns[name] for name in ("position", "row", "col")}
    for image in line.get("images", []):
        first, last = image.get("positions", (0, 0))
        if first <= columns["position"] < last:
            described = {name: image.get(name) for name in ("file", "sha256", "size")}
            patch = {"row": columns["row"], "col": columns["col"]}
            tile = {
                "tile": _tile_number(image, columns["position"]),
                "tiles": len(image.get("tiles") or [image]),
            }
            return {**described, **patch, **tile, "rectangle": patch_rectangle(image, **place)}
    return None


def patch_rectangle(image: dict[str, Any], position: int, row: int, col: int) -> list[float] | None:
    """Where in its picture an image token looks: the one place that knows.

    image: of `images` in a line of samples.jsonl; position, row, col: the token's columns. Gives
    [left, top, right, bottom] in pixels of the upright original: the crop box of the token's tile, cut into
    the tile's grid, within the picture (so a patch that saw padding alone has no area). None where the token
    is no patch, or the cache does not say what it saw.
    """
    number = _tile_number(image, position)
    tile = image if number is None or not image.get("tiles") else image["tiles"][number]
    if row < 0 or number is None or tile.get("crop") is None or tile.get("grid") is None:
        return None
    left, top, right, bottom = tile["crop"]
    rows, cols = tile["grid"]
    width, height = image["size"]
    across, down = (right - left) / cols, (bottom - top) / rows
    edges = (left + col * across, top + row * down, left + (col + 1) * across, top + (row + 1) * down)
    return [
        round(min(max(edge, 0.0), most), 2) for edge, most in zip(edges, (width, height) * 2, strict=True)
    ]


def _tile_number(image: dict[str, Any], position: int) -> int | None:
    """Which of the picture's grids spans the position; 0 where it is a single grid."""
    if not image.get("tiles"):
        return 0
    spans = [tile["positions"] for tile in image["tiles"]]
    return next((nth for nth, (first, last) in enumerate(spans) if first <= position < last), None)
