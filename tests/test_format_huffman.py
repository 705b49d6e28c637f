"""Frames of Huffman codes alone: any zstd reads them, and they are as small as such codes can be."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numcodecs import Zstd
from zstandard import ZstdDecompressor, get_frame_parameters

from clt.cache_format import huffman
from clt.cache_format.compiled import COMPILED

Bytes = npt.NDArray[np.uint8]

LONGEST = 11
"""Bits of a code; zstd's frames have no longer ones."""
AROUND = 50
"""Bytes of a frame but its codes, without its description: header, checksum, blocks' headers and ends."""

compiled = pytest.mark.skipif(not COMPILED, reason="huffman.c is not compiled here")


def normal(rng: np.random.Generator, size: int, width: float) -> Bytes:
    return np.clip(np.rint(rng.normal(0, width, size)), -127, 127).astype(np.int8).view(np.uint8)


def heavy(rng: np.random.Generator, size: int, width: float) -> Bytes:
    return np.clip(np.rint(rng.standard_t(3, size) * width), -128, 127).astype(np.int8).view(np.uint8)


def falling(rng: np.random.Generator, size: int, width: float) -> Bytes:
    """Each byte so many times rarer than the last: codes would be far longer than LONGEST."""
    share = (1 + 1 / width) ** -np.arange(256.0)
    return rng.permutation(256)[rng.choice(256, size, p=share / share.sum())].astype(np.uint8)


def few(rng: np.random.Generator, size: int, width: float) -> Bytes:
    return rng.choice(rng.integers(0, 256, 1 + int(width) % 9), size).astype(np.uint8)


def even(rng: np.random.Generator, size: int, width: float) -> Bytes:
    """Up to all 256, which leaves nothing to gain."""
    return rng.integers(0, 1 + min(255, int(width * 4)), size).astype(np.uint8)


def high_bytes(rng: np.random.Generator, size: int, width: float) -> Bytes:
    """Of bfloat16s, as a cache of bf16 has them."""
    return (rng.normal(0, width, size).astype(np.float32).view(np.uint32) >> 24).astype(np.uint8)


DRAWN: list[Callable[[np.random.Generator, int, float], Bytes]] = [
    normal, heavy, falling, few, even, high_bytes,
]  # fmt: skip


def frames_of(chunks: Bytes, checksum: bool = True, few: int = 0) -> list[bytes]:
    """few: chunks of fewer bytes are the library's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "FEW", few)
        sizes, data = huffman.encode_noise(chunks, checksum)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(data)
    return [bytes(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def assert_comes_back(chunks: Bytes, checksum: bool = True) -> None:
    for frame, chunk in zip(frames_of(chunks, checksum), chunks, strict=True):
        assert ZstdDecompressor().decompress(frame, allow_extra_data=False) == chunk.tobytes()
        assert Zstd().decode(frame) == chunk.tobytes()
        told = get_frame_parameters(frame)
        assert (told.content_size, told.has_checksum) == (chunk.size, checksum)


SIZES = st.one_of(
    st.integers(1, 300),
    st.integers(300, 40_000),
    st.sampled_from([16_383, 16_384, 16_385, 131_071, 131_072, 131_073, 131_135, 131_136, 262_144, 300_001]),
)


@given(st.sampled_from(DRAWN), SIZES, st.integers(1, 4), st.floats(0.05, 70), st.booleans(), st.integers(0))
@example(even, 262_144, 1, 64, True, 0)
@example(few, 131_073, 2, 1, True, 0)
def test_every_zstd_gives_the_bytes_back(
    draw: Callable[[np.random.Generator, int, float], Bytes],
    size: int,
    number: int,
    width: float,
    checksum: bool,
    seed: int,
) -> None:
    """Of frames of any size, of blocks and of a few bytes, alone and with others."""
    chunks = draw(np.random.default_rng(seed), number * size, width).reshape(number, size)
    assert_comes_back(chunks, checksum)


@given(st.lists(st.binary(min_size=40, max_size=40), min_size=1, max_size=5))
def test_any_bytes_come_back(chunks: list[bytes]) -> None:
    """As Hypothesis likes them."""
    assert_comes_back(np.frombuffer(b"".join(chunks), np.uint8).reshape(-1, 40))


@given(st.data())
def test_what_occurs_once_has_a_code(data: st.DataObject) -> None:
    """Of many bytes only some are counted; what is rare is found wherever it lies."""
    rng = np.random.default_rng(data.draw(st.integers(0)))
    size = data.draw(st.sampled_from([16_384, 20_000, 262_144]))
    chunk = normal(rng, size, data.draw(st.floats(5, 30)))
    for _ in range(data.draw(st.integers(1, 5))):
        chunk[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    assert_comes_back(chunk[None])


@compiled
@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("size", [16_000, 262_144])
def test_no_code_of_these_lengths_is_shorter(
    draw: Callable[[np.random.Generator, int, float], Bytes], size: int
) -> None:
    """Within 0.5 % of the best code of at most LONGEST bits, its description aside."""
    for width in (0.3, 3.0, 8.0, 20.0, 60.0):
        chunk = draw(np.random.default_rng(0), size, width)
        best = min(best_bits(np.bincount(chunk)) / 8, size)
        description = 1 + 4 * np.unique(chunk).size
        assert len(frames_of(chunk[None])[0]) <= 1.005 * best + min(description, 128) + AROUND


def best_bits(count: npt.NDArray[np.int64]) -> int:
    """Bits of the best prefix code whose lengths are limited (Larmore and Hirschberg 1990), list by list."""
    counts = sorted(count[count > 0].tolist())
    if len(counts) == 1:
        return 0
    leaves = [(number, (symbol,)) for symbol, number in enumerate(counts)]
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        merged = sorted(leaves + packages)
        pairs = zip(merged[::2], merged[1::2], strict=False)
        packages = [(one + other, of_one + of_other) for (one, of_one), (other, of_other) in pairs]
    return sum(number for number, _ in packages[: len(counts) - 1])


@compiled
def test_frames_do_not_depend_on_what_was_made_before() -> None:
    """Memory is used again: nothing of other frames is left in it."""
    rng = np.random.default_rng(0)
    chunks = normal(rng, 3 * 36_864, 8).reshape(3, -1)
    first = frames_of(chunks)
    frames_of(heavy(rng, 300_000, 5)[None])
    assert frames_of(chunks) == first


def test_few_bytes_are_the_librarys() -> None:
    """Where descriptions weigh more than time."""
    chunks = normal(np.random.default_rng(0), 2 * 5_000, 8).reshape(2, -1)
    small = frames_of(chunks, few=huffman.FEW)
    assert small == [frame for chunk in chunks for frame in frames_of(chunk[None], few=huffman.FEW)]
    assert [ZstdDecompressor().decompress(frame) for frame in small] == [chunk.tobytes() for chunk in chunks]


def test_without_a_compiler_the_library_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes, of which the same come back."""
    monkeypatch.setattr(huffman, "COMPILED", False)
    for draw in DRAWN:
        assert_comes_back(draw(np.random.default_rng(0), 2 * 20_000, 8).reshape(2, -1))


@compiled
def test_buffers_that_do_not_belong_together_are_refused() -> None:
    """Nothing is written behind an end."""
    from clt.cache_format import _huffman

    chunks, sizes = np.zeros((3, 100), np.uint8), np.empty(3, np.int64)
    room = np.empty(_huffman.room(3, 100), np.uint8)
    _huffman.encode(chunks, True, sizes, room)
    for wrong in (
        (chunks, True, sizes, room[:-1]),
        (chunks.reshape(-1)[1:], True, sizes, room),
        (chunks, True, sizes[:0], room),
        (chunks[:0], True, sizes, room),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            _huffman.encode(*wrong)
