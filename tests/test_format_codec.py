"""The codec: how far a stored value may be from the true one, and that bytes come back or are refused."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numcodecs import Zstd

from clt.cache_format import CacheError, DamagedCacheError
from clt.cache_format.bf16 import from_bf16_bits, to_bf16_bits
from clt.cache_format.codec import decode_chunk, encode_chunk
from clt.cache_format.int8 import dequantise, quantise
from clt.cache_format.layout import BLOCK, n_blocks

LARGEST = 127 * 65504.0
FINITE = st.floats(-LARGEST, LARGEST, width=32)
SCALES = st.sampled_from([0.0, 1e-38, 1e-9, 1e-3, 1.0, 30.0, 27_520.0, 8e6])


@st.composite
def activations(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """(token, channel): Gaussian, each token with a scale of its own, with outliers anywhere."""
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = np.array(draw(st.lists(SCALES, min_size=tokens, max_size=tokens)), np.float32)
    values = np.clip(rng.standard_normal((tokens, width)) * sizes[:, None], -LARGEST, LARGEST)
    for _ in range(draw(st.integers(0, 3))):
        values[draw(st.integers(0, tokens - 1)), draw(st.integers(0, width - 1))] = draw(FINITE)
    return values.astype(np.float32)


def worst_over_step(values: npt.NDArray[np.float32], divisor: float) -> float:
    """Largest |code * step - value| / step."""
    codes, scale = quantise(values, divisor)
    assert codes.dtype == np.int8
    assert scale.shape == (len(values), n_blocks(values.shape[1]))
    step = np.repeat(scale.astype(np.float64), BLOCK, axis=1)[:, : values.shape[1]]
    lost = np.abs(codes.astype(np.float64) * step - values)
    return float(np.max(lost / np.where(step > 0, step, 1)))


@given(activations(), st.sampled_from([1.0, 8.0, 16.0, 64.0]))
@example(np.zeros((2, 80), np.float32), 8.0)
@example(np.full((1, 65), LARGEST, np.float32), 8.0)
@example(np.full((1, 65), 1e-45, np.float32), 8.0)
def test_no_value_is_off_by_more_than_half_a_step(values: npt.NDArray[np.float32], divisor: float) -> None:
    """Massive, tiny and zero values, narrow last blocks: never clipped (but for float32's last digits)."""
    assert worst_over_step(values, divisor) <= 0.5 + 1e-4


@given(activations())
def test_dequantise_is_code_times_step(values: npt.NDArray[np.float32]) -> None:
    """The product in float32, each channel with the step of its own block."""
    codes, scale = quantise(values, 8.0)
    back = dequantise(codes, scale)
    assert back.dtype == np.float32
    for channel in range(values.shape[1]):
        expected = codes[:, channel] * scale[:, channel // BLOCK].astype(np.float32)
        np.testing.assert_array_equal(back[:, channel], expected)


@given(activations())
def test_a_token_is_stored_alike_in_any_company(values: npt.NDArray[np.float32]) -> None:
    """Codes and steps of a token do not depend on the tokens beside it, so resuming cannot change them."""
    together = quantise(values, 8.0)
    for row in range(len(values)):
        alone = quantise(values[row : row + 1], 8.0)
        np.testing.assert_array_equal(alone.codes[0], together.codes[row])
        np.testing.assert_array_equal(alone.scale[0], together.scale[row])


def test_many_tokens_are_stored_as_each_of_them() -> None:
    """Also where there are more tokens than are quantised at a time."""
    values = np.random.default_rng(0).standard_normal((700, 512)).astype(np.float32)
    codes, scale = quantise(values, 8.0)
    tail = quantise(values[690:], 8.0)
    np.testing.assert_array_equal(codes[690:], tail.codes)
    np.testing.assert_array_equal(scale[690:], tail.scale)


def test_zeros_stay_zeros() -> None:
    """A token of zeros has step 0 and comes back as zeros, without a warning."""
    codes, scale = quantise(np.zeros((3, 70), np.float32), 8.0)
    assert not scale.any()
    assert not dequantise(codes, scale).any()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3e38, LARGEST * 1.01])
@pytest.mark.parametrize("place", [(0, 0), (1, 79)])
def test_what_int8_cannot_hold_is_refused(bad: float, place: tuple[int, int]) -> None:
    """NaN, Inf and overflow, in a full block or the narrow last one: an error and not a clipped number."""
    values = np.ones((2, 80), np.float32)
    values[place] = bad
    with pytest.raises(CacheError, match=r"not finite, or beyond 8\.3e6"):
        quantise(values, 8.0)


def test_every_bf16_pattern_comes_back() -> None:
    """All 65,536 patterns, NaN payloads and infinities included, through bytes and as float32 bits."""
    bits = np.random.default_rng(0).permutation(65_536).astype(np.uint16)
    for chunk in bits.reshape(8, 64, 128):
        back = np.empty_like(chunk)
        decode_chunk(memoryview(encode_chunk(chunk)), back)
        np.testing.assert_array_equal(back, chunk)
    as_floats = from_bf16_bits(bits)
    np.testing.assert_array_equal(as_floats.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(to_bf16_bits(as_floats), bits)


@given(arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
@example(np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000001, 0x00008000] * 13, np.uint32)[:64])
def test_float32_is_rounded_as_torch_rounds(bits: npt.NDArray[np.uint32]) -> None:
    """Nearest, ties to even, overflow to infinity; a NaN stays a NaN."""
    values = bits.view(np.float32)
    ours = to_bf16_bits(values)
    theirs = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(from_bf16_bits(ours[nan])).all()


CHUNKS = {
    "int8": np.random.default_rng(1).integers(-20, 20, (64, 80)).astype(np.int8),
    "scale": np.random.default_rng(2).random((64, 2)).astype(np.float16),
    "uint16": to_bf16_bits(np.random.default_rng(3).standard_normal((64, 80)).astype(np.float32)),
    "noise": np.random.default_rng(4).integers(0, 65_536, (64, 8)).astype(np.uint16),
    "int64": np.arange(8, dtype=np.int64),
    "zeros": np.zeros((64, 80), np.int8),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk_comes_back(name: str) -> None:
    """Same numbers, whatever the dtype, also from a strided array."""
    chunk = CHUNKS[name]
    back = np.empty_like(chunk)
    decode_chunk(memoryview(encode_chunk(chunk)), back)
    np.testing.assert_array_equal(back, chunk)
    strided = np.repeat(chunk, 2, axis=-1)[..., ::2]
    assert encode_chunk(strided) == encode_chunk(chunk)


@pytest.mark.parametrize("name", CHUNKS)
def test_an_altered_byte_never_gives_a_wrong_number(name: str) -> None:
    """Every flipped bit is refused; one bit of a zstd header means nothing, and leaves the numbers right."""
    chunk = CHUNKS[name]
    stored = encode_chunk(chunk)
    harmless = 0
    for bit in range(0, 8 * len(stored), 1 if len(stored) < 600 else 13):
        altered = bytearray(stored)
        altered[bit // 8] ^= 1 << bit % 8
        back = np.empty_like(chunk)
        try:
            decode_chunk(memoryview(bytes(altered)), back)
        except DamagedCacheError:
            continue
        np.testing.assert_array_equal(back, chunk)
        harmless += 1
    assert harmless <= (chunk.dtype != np.uint16)


@pytest.mark.parametrize("name", CHUNKS)
def test_a_cut_or_lengthened_chunk_is_refused(name: str) -> None:
    """Any prefix, and any byte too many."""
    chunk = CHUNKS[name]
    stored = encode_chunk(chunk)
    back = np.empty_like(chunk)
    for cut in [*range(min(40, len(stored))), len(stored) - 1]:
        with pytest.raises(DamagedCacheError):
            decode_chunk(memoryview(stored[:cut]), back)
    with pytest.raises(DamagedCacheError):
        decode_chunk(memoryview(stored + b"\0"), back)


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("rows", [-1, 1])
def test_a_chunk_of_another_size_is_refused(name: str, rows: int) -> None:
    """A whole frame of fewer or more numbers than the place has is an error that names both sizes."""
    chunk = CHUNKS[name]
    place = np.empty((chunk.shape[0] + rows, *chunk.shape[1:]), chunk.dtype)
    with pytest.raises(DamagedCacheError, match=f"holds {chunk.nbytes} bytes, expected {place.nbytes}"):
        decode_chunk(memoryview(encode_chunk(chunk)), place)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    """Two frames behind one another, or a second one that fills what the first left, are no chunk."""
    half = Zstd(level=1, checksum=True).encode(np.zeros(32, np.int8))
    for stored in (half + half, half * 2 + b"\x50\x2a\x4d\x18\0\0\0\0"):
        with pytest.raises(DamagedCacheError):
            decode_chunk(memoryview(stored), np.empty(64, np.int8))


@given(st.binary(max_size=80), st.sampled_from([np.int8, np.uint16, np.float16, np.float64]))
def test_any_bytes_are_a_chunk_or_damaged(data: bytes, dtype: type) -> None:
    """No bytes give another exception."""
    with pytest.raises(DamagedCacheError):
        decode_chunk(memoryview(b"\x28\xb5\x2f\xfd" + data), np.empty(64, dtype))
