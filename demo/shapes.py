"""Drawn pictures with one shape each, and what is true of them.

A picture is decided by one integer, so training, test and demo pictures can be told apart by range:
training draws from TRAINING, scores are taken on UNSEEN, the demo's dataset is DEMO.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 56
"""Pixels; the demo model's tower takes this size."""
COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")

TRAINING = range(1_000_000_000)
UNSEEN = range(1_000_000_000, 1_000_100_000)
DEMO = range(1_000_100_000, 1_000_200_000)


class Scene(NamedTuple):
    colour: str
    shape: str
    background: str
    centre: tuple[int, int]
    """x, y in pixels"""
    radius: int
    """of the circle around the shape, pixels"""


class Turn(NamedTuple):
    question: str
    answer: str


def scene(number: int) -> Scene:
    """The scene of picture `number`: colours, shape, place and size are independent and uniform."""
    rng = np.random.default_rng(number)
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    radius = int(rng.integers(9, 21))
    x, y = rng.integers(radius, SIDE - radius, size=2)
    return Scene(str(colour), str(rng.choice(SHAPES)), str(background), (int(x), int(y)), radius)


def draw(number: int) -> Image.Image:
    """Picture `number`, RGB, SIDE x SIDE; colours are jittered, so that none is one exact value."""
    what = scene(number)
    rng = np.random.default_rng((number, 1))
    ink, paper = (
        tuple(int(c) for c in np.clip(np.array(COLOURS[name]) + rng.integers(-14, 15, 3), 0, 255))
        for name in (what.colour, what.background)
    )
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    _draw_shape(ImageDraw.Draw(picture), what, ink)
    return picture


def coverage(number: int, patch: int) -> np.ndarray:
    """Share of each patch that the shape covers: float32 (SIDE // patch, SIDE // patch)."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    _draw_shape(ImageDraw.Draw(mask), scene(number), 1)
    n = SIDE // patch
    blocks = np.asarray(mask, np.float32).reshape(n, patch, n, patch)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _draw_shape(pen: ImageDraw.ImageDraw, what: Scene, ink: tuple[int, ...] | int) -> None:
    (x, y), r = what.centre, what.radius
    match what.shape:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        case "square":
            h = round(r * 0.8)
            pen.rectangle((x - h, y - h, x + h, y + h), fill=ink)
        case "triangle":
            w = round(r * 0.87)
            pen.polygon([(x, y - r), (x - w, y + r // 2), (x + w, y + r // 2)], fill=ink)
        case "cross":
            t = max(2, r // 4)
            pen.rectangle((x - t, y - r, x + t, y + r), fill=ink)
            pen.rectangle((x - r, y - t, x + r, y + t), fill=ink)


def caption(number: int) -> str:
    """Such as `A red circle on a blue background.`"""
    what = scene(number)
    return f"{_a(what.colour).capitalize()} {what.shape} on {_a(what.background)} background."


def turns(number: int) -> list[Turn]:
    """Everything that is asked about picture `number`; the caption comes first."""
    what = scene(number)
    return [
        Turn("Describe the picture.", caption(number)),
        Turn("What shape is in the picture?", f"A {what.shape}."),
        Turn(f"What colour is the {what.shape}?", f"The {what.shape} is {what.colour}."),
        Turn("What colour is the background?", f"The background is {what.background}."),
    ]


def _a(colour: str) -> str:
    return f"an {colour}" if colour == "orange" else f"a {colour}"
