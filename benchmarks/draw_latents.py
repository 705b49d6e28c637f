"""A picture of latents for the README: pictures, the same in grey with the heat, and their captions."""

import base64
from html import escape
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE, GAP, LEFT = 92, 10, 20
WIDTH = 2 * LEFT + 8 * SIDE + 7 * GAP
STYLE = (
    "text{font:15px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1d2330}"
    ".h{font-weight:650;font-size:17px}.s{fill:#5a6170}.w{font:13px ui-monospace,Menlo,Consolas,monospace}"
)


class Shown(NamedTuple):
    title: str
    scores: str
    maps: list[tuple[Image.Image, npt.NDArray[np.float64]]]
    """pictures and (row, column) activations"""
    captions: list[list[tuple[str, float]]]
    """of the same pictures: words and activations"""
    largest: float


def draw(latents: list[Shown]) -> str:
    """SVG, with the pictures inside."""
    parts, top = [], LEFT
    for latent in latents:
        parts.append(f'<text class="h" x="{LEFT}" y="{top + 16}">{escape(latent.title)}</text>')
        parts.append(f'<text class="s" x="{LEFT + 204}" y="{top + 16}">{escape(latent.scores)}</text>')
        for number, ((picture, heat), caption) in enumerate(zip(latent.maps, latent.captions, strict=True)):
            x, y = LEFT + number * 2 * (SIDE + GAP), top + 30
            parts += [_picture(picture, x, y), _heat(picture, heat / latent.largest, x + SIDE + 2, y)]
            parts += _caption(caption, latent.largest, x, y + SIDE + 6)
        top += 30 + SIDE + 64
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}">'
    )
    back = f'<rect width="{WIDTH}" height="{top}" rx="10" fill="#fbfaf7"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", back, *parts, "</svg>\n"])


def _picture(picture: Image.Image, x: float, y: float, more: str = "") -> str:
    out = BytesIO()
    picture.save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    size = f'x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"'
    return f'<image {size} style="image-rendering:pixelated" {more}href="data:image/png;base64,{data}"/>'


def _heat(picture: Image.Image, heat: npt.NDArray[np.float64], x: float, y: float) -> str:
    """In grey, each patch in the place that it was cut from."""
    side = SIDE / len(heat)
    patches = [
        f'<rect x="{x + c * side:.1f}" y="{y + r * side:.1f}" width="{side:.1f}" height="{side:.1f}" '
        f'fill="#d95f02" opacity="{0.12 + 0.78 * heat[r, c] ** 0.5:.2f}"/>'
        for r, c in zip(*map(np.ndarray.tolist, np.nonzero(heat)), strict=True)
    ]
    return _picture(picture.convert("L"), x, y, 'opacity=".4" ') + "".join(patches)


def _caption(words: list[tuple[str, float]], largest: float, x: float, y: float) -> list[str]:
    """In lines of a picture pair's width, words shaded by activation."""
    parts, across, width = [], 0.0, 7.9
    for word, value in words:
        if across + len(word) * width > 2 * SIDE:
            across, y = 0.0, y + 20
        if value > 0:
            shade = 0.85 * (0.12 + 0.78 * (value / largest) ** 0.5)
            box = f'x="{x + across - 2:.1f}" y="{y}" width="{len(word) * width + 4:.1f}" height="18" rx="3"'
            parts.append(f'<rect {box} fill="#d95f02" opacity="{shade:.2f}"/>')
        parts.append(f'<text class="w" x="{x + across:.1f}" y="{y + 13}">{escape(word)}</text>')
        across += (len(word) + 1) * width
    return parts
