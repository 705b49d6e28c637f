"""How a family lays its image tokens over a picture: in one grid or several, each over a part of it.

A processor says how many tokens a picture becomes, not where each of them looks. That is worked out here,
from what it is given and what it gave; `place_patches` then counts the tokens, so that a processor which
does something else is found out.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .crop import Box, given_sides, seen_box
from .rows import BadSample


class Tile(NamedTuple):
    """A grid of image tokens, row by row."""

    rows: int
    cols: int
    box: Box
    """What it covers, in pixels of the picture that the processor was given."""
    newlines: bool = False
    """A token that is no patch stands behind each row."""

    @property
    def tokens(self) -> int:
        return self.rows * (self.cols + self.newlines)


class Prompt(NamedTuple):
    """What a layout is worked out from."""

    processor: Any
    inputs: dict[str, Any]
    """What the processor gave."""
    sizes: list[tuple[int, int]]
    """Width and height of each picture as the processor was given it."""
    runs: list[tuple[int, int]]
    """First position of each uninterrupted run of image tokens, and the position behind it."""

    @property
    def images(self) -> Any:
        return self.processor.image_processor

    def text_between(self, start: int, stop: int) -> str:
        ids = self.inputs["input_ids"][0, start:stop]
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=False))


class PlacedTile(NamedTuple):
    start: int
    """Position of its first token."""
    stop: int
    """The position behind its last."""
    tile: Tile | None
    """None where the family is not known."""


class Places(NamedTuple):
    row: npt.NDArray[np.int16]
    """(token,) Of the patch in its tile; -1 for all that is no patch."""
    col: npt.NDArray[np.int16]
    picture: npt.NDArray[np.int16]
    """(token,) Which picture; -1 for what is no image token. Separators have one, and no row."""
    tiles: list[list[PlacedTile]]
    """By picture, in the order of their tokens."""


def no_places(n_tokens: int) -> Places:
    """Of a prompt without pictures."""
    row, col, picture = np.full((3, n_tokens), -1, np.int16)
    return Places(row, col, picture, [])


def find_runs(is_image: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_image, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def knows(processor: Any) -> bool:
    """Whether the places of its patches are known."""
    return type(processor).__name__ in LAYOUTS


def place_patches(prompt: Prompt, n_tokens: int) -> Places:
    """Row, column and picture of each token; BadSample where there are more or fewer than the layout says."""
    row, col, picture, placed = no_places(n_tokens)
    spots = np.concatenate([np.arange(*run) for run in prompt.runs]) if prompt.runs else np.empty(0, int)
    name = type(prompt.processor).__name__
    if name not in LAYOUTS:
        for nth, part in enumerate(_share_runs(prompt)):
            picture[part] = nth
            placed.append([PlacedTile(int(part[0]), int(part[-1]) + 1, None)])
        return Places(row, col, picture, placed)
    tiled = [[tile for tile in tiles if tile.tokens] for tiles in LAYOUTS[name](prompt)]
    expected = sum(tile.tokens for tiles in tiled for tile in tiles)
    if expected != len(spots):
        raise BadSample(
            f"{len(spots)} image tokens where {name} was expected to make {expected} "
            f"of pictures of {', '.join(f'{w} x {h}' for w, h in prompt.sizes)}"
        )
    at = 0
    for nth, tiles in enumerate(tiled):
        placed.append([])
        for tile in tiles:
            mine = spots[at : (at := at + tile.tokens)]
            picture[mine] = nth
            row[mine], col[mine] = _count_cells(tile)
            placed[-1].append(PlacedTile(int(mine[0]), int(mine[-1]) + 1, tile))
    return Places(row, col, picture, placed)


def _count_cells(tile: Tile) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    row, col = np.divmod(np.arange(tile.tokens), tile.cols + tile.newlines)
    patch = col < tile.cols
    return np.where(patch, row, -1).astype(np.int16), np.where(patch, col, -1).astype(np.int16)


def _share_runs(prompt: Prompt) -> list[npt.NDArray[np.int64]]:
    """Of an unknown family: each picture its equal share of the runs of image tokens."""
    each, rest = divmod(len(prompt.runs), len(prompt.sizes))
    if rest or not each:
        raise BadSample(f"{len(prompt.runs)} runs of image tokens for {len(prompt.sizes)} images")
    parts = [np.arange(*run) for run in prompt.runs]
    return [np.concatenate(parts[first : first + each]) for first in range(0, len(parts), each)]


def _whole(size: tuple[int, int]) -> Box:
    return Box(0.0, 0.0, float(size[0]), float(size[1]))


def _square(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise BadSample(f"{tokens} image tokens form no square grid")
    return side


def one_grid(prompt: Prompt) -> list[list[Tile]]:
    """LLaVA-1.5, Gemma 3, PaliGemma: a square grid, over what crop or padding left of the picture."""
    each, rest = divmod(sum(stop - start for start, stop in prompt.runs), len(prompt.sizes))
    if rest:
        raise BadSample(f"{len(prompt.sizes)} images do not share their image tokens equally")
    side = _square(each)
    return [[Tile(side, side, seen_box(prompt.images, size))] for size in prompt.sizes]


def own_grid(prompt: Prompt) -> list[list[Tile]]:
    """Qwen-VL: the picture keeps its shape; a token is merge_size x merge_size patches."""
    merge = prompt.images.merge_size
    grids = prompt.inputs["image_grid_thw"].tolist()
    return [
        [Tile(rows // merge, cols // merge, _whole(size))]
        for (_, rows, cols), size in zip(grids, prompt.sizes, strict=True)
    ]


def any_resolution(prompt: Prompt) -> list[list[Tile]]:
    """LLaVA-NeXT and OneVision: the whole picture squeezed, then one grid over all tiles, without padding."""
    return [_base_and_tiles(prompt.processor, size) for size in prompt.sizes]


def _base_and_tiles(processor: Any, size: tuple[int, int]) -> list[Tile]:
    images = processor.image_processor
    pixels = _tile_side(images)
    tokens = getattr(processor, "num_image_tokens", None)
    side = pixels // processor.patch_size if tokens is None else _square(tokens)
    rows, cols, box = _unpadded(images, size, pixels, side)
    aspect = getattr(processor, "vision_aspect_ratio", None)
    if aspect is not None:
        ratio = math.sqrt(rows * cols / (int(aspect.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
    return [Tile(side, side, _whole(size)), Tile(rows, cols, box, newlines=True)]


def _tile_side(images: Any) -> int:
    """Pixels of a tile's side."""
    crop, size = given_sides(images, "crop_size"), given_sides(images, "size")
    return crop[1] if crop else size[1] if size else int(images.size["shortest_edge"])


def _unpadded(images: Any, size: tuple[int, int], pixels: int, side: int) -> tuple[int, int, Box]:
    """Rows and columns that are left where whole cells of padding are cut off, and the box they cover."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    down, across = select_best_resolution((height, width), images.image_grid_pinpoints)
    rows, cols = down // pixels * side, across // pixels * side
    if width / height > cols / rows:
        cut_rows, cut_cols = (rows - int(round(height * (cols / width), 7))) // 2, 0
        new_width, new_height = across, min(math.ceil(height * (across / width)), down)
    else:
        cut_rows, cut_cols = 0, (cols - int(round(width * (rows / height), 7))) // 2
        new_width, new_height = min(math.ceil(width * (down / height)), across), down
    cell, paste_x, paste_y = pixels / side, (across - new_width) // 2, (down - new_height) // 2
    box = Box(
        (cut_cols * cell - paste_x) * width / new_width,
        (cut_rows * cell - paste_y) * height / new_height,
        ((cols - cut_cols) * cell - paste_x) * width / new_width,
        ((rows - cut_rows) * cell - paste_y) * height / new_height,
    )
    return rows - 2 * cut_rows, cols - 2 * cut_cols, box


def named_tiles(prompt: Prompt) -> list[list[Tile]]:
    """Idefics3 and SmolVLM: tiles whose place the prompt names, `<row_1_col_2>`, then the whole picture."""
    side = _square(prompt.processor.image_seq_len)
    found: list[list[tuple[int, int]]] = [[]]
    stop = 0
    for start, end in prompt.runs:
        named = re.findall(r"<row_(\d+)_col_(\d+)>", prompt.text_between(stop, start))
        if named:
            found[-1].append((int(named[-1][0]) - 1, int(named[-1][1]) - 1))
        else:
            found.append([])
        stop = end
    if found.pop() or len(found) != len(prompt.sizes):
        raise BadSample(f"{len(found)} whole pictures in the prompt for {len(prompt.sizes)} images")
    return [
        [Tile(side, side, _part(size, *at, places)) for at in places] + [Tile(side, side, _whole(size))]
        for places, size in zip(found, prompt.sizes, strict=True)
    ]


def _part(size: tuple[int, int], row: int, col: int, places: list[tuple[int, int]]) -> Box:
    """One of the equal tiles that `places` (row, col) names."""
    rows, cols = (1 + max(place[axis] for place in places) for axis in (0, 1))
    across, down = size[0] / cols, size[1] / rows
    return Box(col * across, row * down, (col + 1) * across, (row + 1) * down)


def counted_tiles(prompt: Prompt) -> list[list[Tile]]:
    """InternVL: as many equal tiles as fit the picture's shape best, then the whole picture, in one run."""
    each = prompt.processor.image_seq_length
    side = _square(each)
    if len(prompt.runs) != len(prompt.sizes):
        raise BadSample(f"{len(prompt.runs)} runs of image tokens for {len(prompt.sizes)} images")
    tiled = []
    for (start, stop), size in zip(prompt.runs, prompt.sizes, strict=True):
        many = (stop - start) // each - 1
        rows, cols = _best_fit(many, size)
        places = [(row, col) for row in range(rows) for col in range(cols)]
        tiles = [Tile(side, side, _part(size, *at, places)) for at in places]
        tiled.append([*tiles, Tile(side, side, _whole(size))])
    return tiled


def _best_fit(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of so many tiles, whose shape is nearest to the picture's."""
    pairs = [(tiles // cols, cols) for cols in range(1, tiles + 1) if tiles % cols == 0]
    return min(pairs, key=lambda pair: abs(size[0] / size[1] - pair[1] / pair[0]), default=(0, 0))


LAYOUTS: dict[str, Callable[[Prompt], list[list[Tile]]]] = {
    "Gemma3Processor": one_grid,
    "Idefics3Processor": named_tiles,
    "InternVLProcessor": counted_tiles,
    "LlavaNextProcessor": any_resolution,
    "LlavaOnevisionProcessor": any_resolution,
    "LlavaProcessor": one_grid,
    "PaliGemmaProcessor": one_grid,
    "Qwen2VLProcessor": own_grid,
    "Qwen2_5_VLProcessor": own_grid,
    "Qwen3VLProcessor": own_grid,
    "SmolVLMProcessor": named_tiles,
}
"""By the processor's class."""
