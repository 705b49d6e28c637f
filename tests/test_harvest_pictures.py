"""Pictures as real datasets have them: each is read as people see it, or refused with a reason."""

import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from clt.cache_format import open_cache
from clt.harvest.config import HarvestConfig
from clt.harvest.pictures import MAX_BYTES, Picture, PictureSource, load_picture
from clt.harvest.rows import BadSample
from clt.harvest.run import harvest

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def load(data: bytes) -> Picture:
    return load_picture({"bytes": data, "path": "a"}, PictureSource(None))


def pixels(picture: Picture) -> np.ndarray:
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image).astype(int)


def test_cmyk_is_seen_in_its_colours() -> None:
    red = Image.new("RGB", (30, 20), RED)
    seen = pixels(load(encoded(red.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(seen - np.array(RED)).max() < 12


def test_a_palette_is_looked_up() -> None:
    drawn = Image.new("RGB", (30, 20), BLUE)
    drawn.putpixel((3, 4), RED)
    seen = pixels(load(encoded(drawn.convert("P", palette=Image.Palette.ADAPTIVE))))
    assert np.abs(seen - np.asarray(drawn).astype(int)).max() < 8


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(form: str) -> None:
    """Pillow alone would clip everything above 255 to white."""
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    seen = pixels(load(encoded(Image.fromarray(grey), form)))
    assert np.array_equal(seen[..., 0], grey >> 8)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((9, 9), 70_000, np.int32), "greys from 70000 to 70000, expected 0 to 65535"),
        (np.full((9, 9), 0.5, np.float32), "floats, whose black and white are not known"),
    ],
)
def test_numbers_that_are_no_picture_are_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        load(encoded(Image.fromarray(values), "TIFF"))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in (RED, GREEN, BLUE)]
    picture = load(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.frames == 3
    assert np.abs(pixels(picture) - np.array(RED)).max() < 12


def test_exif_turns_the_picture_upright() -> None:
    """A camera held upright: the file is 30 wide and 20 high, the picture 20 wide and 30 high."""
    lying = Image.new("RGB", (30, 20), RED)
    lying.paste(BLUE, (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = load(encoded(lying, exif=exif))
    assert picture.size == picture.image.size == (20, 30)
    seen = pixels(picture)
    assert (seen[:15] == BLUE).all()
    assert (seen[15:] == RED).all()


def test_a_broken_exif_does_not_lose_the_picture_or_the_run() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert load(encoded(Image.new("RGB", (30, 20), RED), exif=exif)).size == (30, 20)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 20), (3, 50)])
def test_tiny_pictures_are_enlarged_and_keep_their_size_in_the_log(size: tuple[int, int]) -> None:
    """A processor takes a side of 1 or 3 for the colour axis."""
    picture = load(encoded(Image.new("RGB", size, GREEN)))
    assert picture.size == size
    assert min(picture.image.size) >= 8
    width, height = picture.image.size
    assert width * size[1] == height * size[0]
    assert (pixels(picture) == GREEN).all()


def test_twenty_thousand_pixels_wide() -> None:
    wide = encoded(Image.new("1", (20_000, 300)))
    assert load(wide).size == (20_000, 300)
    with pytest.raises(BadSample, match="too thin: 20000 x 20, at most 100 times"):
        load(encoded(Image.new("1", (20_000, 20))))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (15_000, 12_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(BadSample, match="is too large"):
        load(png_that_claims(*size))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_every_truncation_and_flip_is_a_reason_or_a_picture(form: str) -> None:
    """Whatever the damage, there is a picture or a BadSample; nothing else ever escapes."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    whole = encoded(noise, form)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            for at in rng.integers(0, len(data), 4):
                data[at] ^= int(rng.integers(1, 256))
        try:
            assert pixels(load(bytes(data))).ndim == 3
        except BadSample:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "the file is empty"), (b"GET / HTTP", "10 bytes that are no known image")]
)
def test_what_is_no_picture_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=f"image 'a' cannot be read: {reason}"):
        load(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA"])
def test_the_formats_that_are_read(form: str) -> None:
    assert load(encoded(Image.new("RGB", (30, 20), RED), form)).size == (30, 20)


@pytest.mark.parametrize("form", ["EPS", "PCX", "SGI"])
def test_formats_that_no_dataset_needs_are_not_opened(form: str) -> None:
    """Pillow reads EPS by running Ghostscript, which is a programming language."""
    with pytest.raises(BadSample, match="bytes that are no known image format"):
        load(encoded(Image.new("RGB", (30, 20), RED), form))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/inside.png, secret.png beside root, and a link from root to it."""
    rng = np.random.default_rng(0)
    tiny.write_picture(tmp_path / "root" / "inside.png", rng)
    tiny.write_picture(tmp_path / "secret.png", rng)
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name", ["../secret.png", "folder.png/../../secret.png", "link.png", "{}/secret.png"]
)
def test_a_path_that_climbs_out_is_refused_unless_allowed(folder: Path, name: str) -> None:
    """By dots, by a link, or by being absolute."""
    reference = name.format(folder)
    with pytest.raises(BadSample, match=r"lies outside .*root; set --image-root .*--allow-outside"):
        load_picture(reference, PictureSource(folder / "root"))
    assert load_picture(reference, PictureSource(folder / "root", allow_outside=True)).size == (24, 24)


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nowhere.png", "No such file"),
        ("folder.png", "is no file"),
        ("a\0b.png", "null byte"),
        ("x" * 5000, "File name too long"),
        ("inside.png/x.png", "Not a directory"),
        (7, "expected a path or bytes, found int"),
        ({"url": "x"}, "expected a path or bytes, found NoneType"),
        ("data:image/png;base64,@@@", r"image in the row \(data:image/png;base64\) cannot be read"),
        ("data:image/png,abc", "it is not base64"),
        ("file:///etc/passwd", "is an address"),
    ],
)
def test_references_that_lead_nowhere(folder: Path, reference: object, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        load_picture(reference, PictureSource(folder / "root"))


def test_a_file_too_large_is_not_read(folder: Path) -> None:
    with open(folder / "root" / "big.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(BadSample, match=f"too large: {MAX_BYTES + 1} bytes"):
        load_picture("big.png", PictureSource(folder / "root"))


def test_a_picture_in_the_row_itself() -> None:
    data = encoded(Image.new("RGB", (30, 20), RED))
    inline = "data:image/png;base64," + base64.b64encode(data).decode()
    assert pixels(load_picture(inline, PictureSource(None))).tolist() == pixels(load(data)).tolist()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """(address of a server that has /a.png, the paths it was asked for)"""
    asked: list[str] = []
    data = encoded(Image.new("RGB", (30, 20), RED))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(data if self.path == "/a.png" else b"")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_an_address_is_never_fetched_without_the_flag(server: tuple[str, list[str]]) -> None:
    address, asked = server
    with pytest.raises(BadSample, match=r"is an address; download it first, or allow it with --fetch-urls"):
        load_picture(f"{address}/a.png", PictureSource(None))
    assert asked == []
    allowed = PictureSource(None, fetch_urls=True)
    assert load_picture(f"{address}/a.png", allowed).size == (30, 20)
    with pytest.raises(BadSample, match="cannot be fetched: HTTP Error 404"):
        load_picture(f"{address}/b.png", allowed)
    with pytest.raises(BadSample, match="expected an http or https address"):
        load_picture("ftp://localhost/a.png", allowed)
    assert asked == ["/a.png", "/b.png"]


def test_the_harvest_stores_or_lists_each_of_them(tmp_path: Path) -> None:
    """End to end: odd pictures are in samples.jsonl with hash and size, the bad ones in rejected.jsonl."""
    data = tmp_path / "data"
    data.mkdir()
    good = {
        "one.png": encoded(Image.new("RGB", (1, 1), RED)),
        "wide.png": encoded(Image.new("1", (20_000, 300))),
        "cmyk.jpg": encoded(Image.new("CMYK", (30, 20)), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.full((20, 30), 40_000, np.uint16))),
        "moving.gif": encoded(
            Image.new("RGB", (30, 20), RED),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (30, 20), colour) for colour in (GREEN, BLUE)],
        ),
    }
    bad = {"cut.png": good["cmyk.jpg"][:200], "empty.png": b"", "bomb.png": png_that_claims(60_000, 60_000)}
    for name, content in {**good, **bad}.items():
        (data / name).write_bytes(content)
    names = [*good, *bad, "missing.png", "../climb.png", "https://example.org/a.png"]
    rows = [{**tiny.picture_row(0, name), "id": name} for name in names]
    path = tiny.write_rows(data, rows)
    model = tiny.save_llava(tmp_path / "model")
    harvest(
        HarvestConfig(
            model=str(model), dataset=str(path), cache=tmp_path / "c", window=64, max_bad_fraction=1.0
        )
    )
    cache = open_cache(tmp_path / "c")
    stored = {line["id"]: line["images"][0] for line in cache.samples().values()}
    assert stored.keys() == good.keys()
    assert stored["one.png"]["size"] == [1, 1]
    assert stored["wide.png"]["size"] == [20_000, 300]
    assert stored["moving.gif"]["frames"] == 3
    assert {line["id"] for line in cache.rejected()} == set(names) - good.keys()
    assert all(line["reason"] for line in cache.rejected())
