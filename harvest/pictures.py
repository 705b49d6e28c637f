"""A picture of a sample: found, read, hashed, decoded to upright RGB; or the reason why it cannot be.

What a row names is not trusted: paths stay inside the image root, addresses are fetched only when that is
allowed, and sizes are judged before anything is decoded.
"""

import base64
import binascii
import hashlib
import io
import urllib.error
import urllib.request
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .rows import BadSample

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 1 << 28
"""Of an image file."""
MAX_PIXELS = 178_956_970
"""Pillow's own limit, beyond which it suspects a decompression bomb; a gigabyte once decoded."""
MAX_ASPECT = 100
"""Longer side over shorter: processors scale by the shorter one, so that a thin line becomes gigabytes."""
MIN_SIDE = 8
"""Thinner pictures are enlarged: processors take a side of 1 or 3 for the colour axis."""
FETCH_SECONDS = 30.0
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "MPO", "PPM", "ICO", "TGA")
"""That are opened, of those that Pillow can: it reads EPS by running Ghostscript, a programming language."""


class PictureSource(NamedTuple):
    """Where pictures may come from."""

    root: Path | None
    """Folder of relative paths; None: the current one."""
    allow_outside: bool = False
    """Paths may leave the root."""
    fetch_urls: bool = False
    """http and https addresses are fetched."""


class Picture(NamedTuple):
    reference: str
    """As the dataset names it; `embedded` where it holds the bytes alone."""
    sha256: str
    """Of the file's bytes."""
    size: tuple[int, int]
    """Width and height of the upright original."""
    frames: int
    """Of an animated picture, whose first one is taken; else 1."""
    image: "Image.Image"
    """RGB, upright; larger than `size` by a whole factor where a side is below MIN_SIDE"""


def load_picture(reference: Any, source: PictureSource) -> Picture:
    """BadSample, with a reason, where the picture cannot be had."""
    from PIL import Image, UnidentifiedImageError

    name, data = picture_bytes(reference, source)
    try:
        # of large pictures and broken EXIF; the limit here is ours. Threads would mix up their catch_warnings
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(data), formats=_formats()) as file:
            _check_size(file.size)
            frames = int(getattr(file, "n_frames", 1))
            upright = _upright_rgb(file)
    except (Image.DecompressionBombError, MemoryError) as fault:
        raise BadSample(f"image {name!r} is too large: {fault}") from fault
    except BadSample as fault:
        raise BadSample(f"image {name!r} {fault}") from fault
    except UnidentifiedImageError as fault:
        raise BadSample(f"image {name!r} cannot be read: {_kind_of(data)}") from fault
    except Exception as fault:  # Pillow's readers raise nearly anything on damaged bytes: it is the reason
        raise BadSample(f"image {name!r} cannot be read: {type(fault).__name__}: {fault}") from fault
    return Picture(name, hashlib.sha256(data).hexdigest(), upright.size, frames, _enlarged(upright))


def picture_bytes(reference: Any, source: PictureSource) -> tuple[str, bytes]:
    """(what to call it, bytes of the file)"""
    if isinstance(reference, dict):
        name = str(reference.get("path") or "embedded")
        if isinstance(reference.get("bytes"), bytes):
            return name, reference["bytes"]
        reference = reference.get("path")
    if isinstance(reference, bytes):
        return "embedded", reference
    if not isinstance(reference, str):
        raise BadSample(f"image: expected a path or bytes, found {type(reference).__name__}")
    if reference.startswith("data:"):
        return "embedded", _decode_data(reference)
    if "://" in reference:
        return reference, _fetch(reference, source)
    return reference, _read_file(reference, source)


def _read_file(reference: str, source: PictureSource) -> bytes:
    base = (source.root or Path()).resolve()
    try:
        path = (base / reference).resolve()
        if not source.allow_outside and not path.is_relative_to(base):
            raise BadSample(
                f"image {reference!r} lies outside {base}; set --image-root to a folder that holds it, "
                "or allow it with --allow-outside"
            )
        if path.exists() and not path.is_file():
            raise BadSample(f"image {reference!r} is no file ({path})")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadSample(f"image {reference!r} is too large: {size} bytes, at most {MAX_BYTES} are read")
        return path.read_bytes()
    except BadSample:
        raise
    except OSError as fault:
        raise BadSample(f"image {reference!r} cannot be read: {fault.strerror}") from fault
    except ValueError as fault:  # a NUL in the path
        raise BadSample(f"image {reference!r} cannot be read: {fault}") from fault


def _decode_data(reference: str) -> bytes:
    head, _, body = reference.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as fault:
        raise BadSample(f"image in the row ({head[:40]}) cannot be read: {fault}") from fault


def _fetch(reference: str, source: PictureSource) -> bytes:
    if not source.fetch_urls:
        raise BadSample(
            f"image {reference!r} is an address; download it first, or allow it with --fetch-urls"
        )
    if not reference.startswith(("http://", "https://")):
        raise BadSample(f"image {reference!r}: expected an http or https address")
    request = urllib.request.Request(reference, headers={"User-Agent": "clt"})
    try:
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
            data: bytes = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as fault:
        raise BadSample(f"image {reference!r} cannot be fetched: {fault}") from fault
    if len(data) > MAX_BYTES:
        raise BadSample(f"image {reference!r} is too large: more than {MAX_BYTES} bytes")
    return data


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadSample(f"is too large: {width} x {height}, at most {MAX_PIXELS} pixels")
    if max(size) > MAX_ASPECT * min(size):
        raise BadSample(f"is too thin: {width} x {height}, at most {MAX_ASPECT} times longer than wide")


def _upright_rgb(file: "Image.Image") -> "Image.Image":
    """Turned as its EXIF says; 16-bit greys keep their upper eight bits, alpha is dropped."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(file)
    if upright.mode == "F":
        raise BadSample("holds floats, whose black and white are not known")
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadSample(f"holds greys from {grey.min()} to {grey.max()}, expected 0 to 65535")
        upright = Image.fromarray((grey >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _enlarged(picture: "Image.Image") -> "Image.Image":
    from PIL import Image

    factor = -(-MIN_SIDE // min(picture.size))
    if factor == 1:
        return picture
    width, height = picture.size
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _kind_of(data: bytes) -> str:
    return f"{len(data)} bytes that are no known image format" if data else "the file is empty"
