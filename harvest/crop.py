"""Which part of a picture the model saw: the box of the original that its grid of patches covers.

Holds for processors that make one grid of a picture: resize, then crop, or pad to a square and resize, with
the attributes that transformers gives them. What cuts a picture into tiles is in grids.py.
"""

import math
from typing import Any, NamedTuple


class Box(NamedTuple):
    """In pixels of the upright original; what was padded lies outside of it."""

    left: float
    top: float
    right: float
    bottom: float


def seen_box(image_processor: Any, size: tuple[int, int]) -> Box:
    """The box of a picture of `size` (width, height) that reaches the model."""
    width, height = map(float, size)
    left = top = 0.0
    if getattr(image_processor, "do_pad", None) and given_sides(image_processor, "pad_size") is None:
        side = max(size)  # LLaVA's padding to a square, before the resizing
        left, top = -float((side - size[0]) // 2), -float((side - size[1]) // 2)
        width = height = float(side)
    crop = given_sides(image_processor, "crop_size")
    if not getattr(image_processor, "do_center_crop", None) or crop is None:
        return Box(left, top, left + width, top + height)
    new_width, new_height = _resized(image_processor, (int(width), int(height)))
    cut_left = math.floor((new_width - crop[0]) / 2)
    cut_top = math.floor((new_height - crop[1]) / 2)
    across, down = width / new_width, height / new_height
    return Box(
        left + cut_left * across,
        top + cut_top * down,
        left + (cut_left + crop[0]) * across,
        top + (cut_top + crop[1]) * down,
    )


def _resized(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height before the crop."""
    if not getattr(image_processor, "do_resize", None):
        return size
    fixed = given_sides(image_processor, "size")
    if fixed is not None:
        return fixed
    wanted = image_processor.size
    shortest, longest = wanted["shortest_edge"], wanted.get("longest_edge")
    short, long = min(size), max(size)
    new_short, new_long = shortest, int(shortest * long / short)
    if longest is not None and new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


def given_sides(image_processor: Any, name: str) -> tuple[int, int] | None:
    """Width and height of a size given by both; None where it is not."""
    given = getattr(image_processor, name, None)
    if given is None or given.get("width") is None or given.get("height") is None:
        return None
    return int(given["width"]), int(given["height"])
