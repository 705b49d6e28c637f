"""Values to stored numbers and back, and stored numbers to bytes and back.

int8: one step a token, 1.2533 * mean |value| / divisor: rms / divisor for a Gaussian, but a few massive
channels do not coarsen the rest. A block of 64 channels whose largest value does not fit into 127 such
steps gets a step of its own, absmax / 127, so that nothing is ever clipped. (One step for all channels costs
fewer bits at equal noise than a step that follows each block.) bf16: the bits themselves, kept as uint16.

Chunks become bytes through codecs that every Zarr v3 reader has: zstd with its checksum for int8 codes and
scales, and blosc (byte shuffle, zstd) followed by crc32c for bf16.
"""

import math
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google_crc32c import value as crc32c
from numcodecs import Blosc, Zstd, blosc
from zstandard import (
    STRATEGY_FAST,
    ZstdCompressionParameters,
    ZstdCompressor,
    ZstdDecompressor,
    ZstdError,
)

from .compiled import COMPILED
from .errors import CacheError, DamagedCacheError
from .layout import BLOCK, n_blocks

if COMPILED:
    from . import _quantise

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint16]
Scales = npt.NDArray[np.float16]
Array = npt.NDArray[Any]

GAUSSIAN = math.sqrt(math.pi / 2)
"""Root mean square of a Gaussian over its mean absolute value."""

SLAB = 1 << 18
"""Values quantised at a time: the temporaries still fit into the processor's cache, and what each of numpy's
calls costs shows little (a quarter of this is a third slower)."""

SMALL = 1 << 16
"""Bytes of a chunk up to which a kept decompressor and a copy are faster than decoding into place."""

UNSTORABLE = (
    "an activation is not finite, or beyond 8.3e6, which int8 blocks cannot hold; "
    "look at the sample, or harvest with --precision bf16"
)

_LARGEST_STEP = np.float32(np.finfo(np.float16).max)

blosc.use_threads = False  # one decoder a thread: its global pool would serialise our threads

_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)  # reads what `_pack_bf16` writes
_BLOSC_HEAD = struct.Struct("<4B3I")
_BLOSC_SHUFFLED_ZSTD, _BLOSC_STORED = 0x81, 0x03
_BLOSC_SPLITTABLE = 128  # blosc reads no shorter streams
_LOCAL = threading.local()

ZSTD_JSON = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
BYTES_JSON = {"name": "bytes", "configuration": {"endian": "little"}}
ONE_BYTE_JSON = {"name": "bytes"}
CRC32C_JSON = {"name": "crc32c"}
BLOSC_JSON = {
    "name": "blosc",
    "configuration": {"typesize": 2, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0},
}


class Quantised(NamedTuple):
    codes: npt.NDArray[np.int8]
    """(token, d_model), -127 to 127"""
    scale: Scales
    """(token, block): the step of each block"""


class Steps(NamedTuple):
    """A few tokens in units of their steps; (token, block, BLOCK), zero behind a narrow last block."""

    exact: Floats
    rounded: Floats
    """the codes"""
    peak: Floats
    """(token, block): largest |code|"""
    step: Floats
    """(token, block): as stored"""


def quantise(values: Floats, divisor: float) -> Quantised:
    """int8 codes and float16 steps of `values` (token, d_model); |code * step - value| <= step / 2.

    Raises CacheError where a value is not finite, or so large that its step overflows float16.
    """
    tokens, width = values.shape
    codes = np.empty((tokens, width), np.int8)
    scale = np.empty((tokens, n_blocks(width)), np.float16)
    if COMPILED:
        if _quantise.quantise(np.ascontiguousarray(values), width, GAUSSIAN / divisor, codes, scale) >= 0:
            raise CacheError(UNSTORABLE)
        return Quantised(codes, scale)
    for rows in slabs(tokens, width):
        quantise_slab(values[rows], divisor, codes[rows], scale[rows])
    return Quantised(codes, scale)


def slabs(tokens: int, width: int) -> Iterator[slice]:
    """The tokens in portions of about SLAB values."""
    at_once = max(1, SLAB // width)
    for start in range(0, tokens, at_once):
        yield slice(start, min(tokens, start + at_once))


def quantise_slab(values: Floats, divisor: float, codes: npt.NDArray[np.int8], scale: Scales) -> Steps:
    """As `quantise`, into `codes` and `scale`; what it returns is this thread's until its next call."""
    (tokens, width), blocks = values.shape, n_blocks(values.shape[1])
    size, rounded = _room(0, (tokens, blocks * BLOCK)), _room(1, (tokens, blocks * BLOCK))
    np.abs(values, out=size[:, :width])
    size[:, width:] = 0
    # bits of non-negative floats are ordered as the floats are, NaN last, and integers reduce 4 times as fast
    starts = np.arange(0, size.shape[1], BLOCK)
    peak = np.maximum.reduceat(size.view(np.int32), starts, axis=1).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the scale
        mean = size[:, :width].mean(axis=1, keepdims=True)
        wanted = np.minimum(mean * np.float32(GAUSSIAN / divisor), _LARGEST_STEP)
        step = np.maximum(wanted, peak / np.float32(127))
    scale[...], stored = _round_up_to_half(step)
    check_scale(stored)
    inverse = np.divide(1, stored, out=np.zeros_like(step), where=stored > 0)
    _multiply_blocks(values, inverse, out=size)
    np.rint(size, out=rounded)
    codes[...] = rounded[:, :width]
    by_block = (tokens, blocks, BLOCK)
    return Steps(size.reshape(by_block), rounded.reshape(by_block), np.rint(peak * inverse), stored)


def check_scale(scale: Scales | Floats) -> None:
    """CacheError where a vector was not finite, or so large that its step overflows float16."""
    if not np.isfinite(scale).all():
        raise CacheError(UNSTORABLE)


def _room(number: int, shape: tuple[int, int]) -> Floats:
    """Memory of this thread for temporaries: new memory costs a page fault for each 4 KiB."""
    rooms: dict[int, Floats] = _LOCAL.__dict__.setdefault("rooms", {})
    size = shape[0] * shape[1]
    if number not in rooms or rooms[number].size < size:
        rooms[number] = np.empty(size, np.float32)
    return rooms[number][:size].reshape(shape)


def dequantise(codes: npt.NDArray[np.int8], scale: Scales) -> Floats:
    """float32 values of `codes` (token, d_model) with `scale` (token, block)."""
    values = codes.astype(np.float32)
    _multiply_blocks(values, scale.astype(np.float32), out=values)
    return values


def _multiply_blocks(values: Floats, per_block: Floats, out: Floats) -> None:
    """values (token, d_model) times the factor of their block; `out` may be wider."""
    tokens, width = values.shape
    whole = width // BLOCK
    cut, shape = whole * BLOCK, (tokens, whole, BLOCK)
    factors = per_block[:, :whole, None]
    np.multiply(values[:, :cut].reshape(shape), factors, out=out[:, :cut].reshape(shape))
    if cut < width:
        np.multiply(values[:, cut:], per_block[:, whole:], out=out[:, cut:width])


def to_bf16_bits(values: Floats, out: npt.NDArray[np.uint16] | None = None) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even); a NaN stays a NaN with its upper payload.

    out: where they go, contiguous and of the shape of `values`.
    """
    rounded = np.empty(values.shape, np.uint16) if out is None else out
    flat, places = np.ascontiguousarray(values).reshape(-1), rounded.reshape(-1)
    for start in range(0, flat.size, SLAB):
        _round_to_bf16(flat[start : start + SLAB], places[start : start + SLAB])
    return rounded


def _round_to_bf16(values: Floats, out: npt.NDArray[np.uint16]) -> None:
    bits, up = values.view(np.uint32), _room(0, (1, values.size))[0].view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=up)
    up &= np.uint32(1)
    up += np.uint32(0x7FFF)
    up += bits
    up >>= np.uint32(16)
    out[...] = up
    is_nan = np.isnan(values)
    if is_nan.any():
        kept = bits[is_nan] >> np.uint32(16)
        out[is_nan] = np.where(kept & np.uint32(0x7F), kept, kept | np.uint32(0x40))


def from_bf16_bits(bits: npt.NDArray[np.uint16]) -> Floats:
    return _widen(bits, np.empty(bits.shape, np.float32))


def slab_from_bf16_bits(bits: npt.NDArray[np.uint16]) -> Floats:
    """As `from_bf16_bits`, (token, d_model); what it returns is this thread's until its next call."""
    return _widen(bits, _room(1, (len(bits), bits.shape[1])))


def _widen(bits: npt.NDArray[np.uint16], out: Floats) -> Floats:
    wide = out.view(np.uint32)
    wide[...] = bits
    wide <<= np.uint32(16)
    return out


def encode_chunk(chunk: Array) -> bytes:
    """Stored bytes of one chunk; uint16 is bf16 bits, every other dtype goes through zstd."""
    if chunk.dtype == np.uint16:
        packed = _pack_bf16(chunk)
        check: bytes = crc32c(packed).to_bytes(4, "little")
        return packed + check
    framed: bytes = _ZSTD.encode(np.ascontiguousarray(chunk))
    return framed


def decode_chunk(stored: memoryview, out: Array) -> None:
    """Fill the contiguous array `out` from the stored bytes; DamagedCacheError on any altered byte."""
    try:
        if out.dtype == np.uint16:
            _BLOSC.decode(_checked_blosc(stored, out), out)
        else:
            _check_size(_zstd_content_size(stored), out)
            _decode_zstd(stored, out)
    except (RuntimeError, ValueError, ZstdError) as fault:
        raise DamagedCacheError(f"a chunk does not decode: {fault}") from fault


def _decode_zstd(stored: memoryview, out: Array) -> None:
    """numcodecs decodes into place, but makes a context each time, which costs more than a small frame."""
    if out.nbytes > SMALL:
        _ZSTD.decode(stored, out)
        return
    if not hasattr(_LOCAL, "decompressor"):
        _LOCAL.decompressor = ZstdDecompressor()
    data = _LOCAL.decompressor.decompress(stored, allow_extra_data=False)
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def _checked_blosc(stored: memoryview, out: Array) -> memoryview:
    """The container without its crc32c, once that and the header are found to be what `_pack_bf16` writes."""
    packed, check = stored[:-4], int.from_bytes(stored[-4:], "little")
    if crc32c(np.frombuffer(packed, np.uint8)) != check:
        raise DamagedCacheError("the chunk's crc32c does not match")
    if len(packed) < _BLOSC_HEAD.size:
        raise DamagedCacheError("a chunk is not a blosc container")
    version, zstd, flags, item, size, block, stored_size = _BLOSC_HEAD.unpack_from(packed)
    _check_size(size, out)
    known = flags in (_BLOSC_SHUFFLED_ZSTD, _BLOSC_STORED)
    if not known or (version, zstd, item, block, stored_size) != (2, 1, 2, size, len(packed)):
        raise DamagedCacheError("a chunk is not a blosc container of this format")
    return packed


def _pack_bf16(chunk: Array) -> bytes:
    """A blosc container of one block: the low bytes (last bit of the exponent, mantissa) as they are, for
    they are noise, then the high bytes (sign and the rest of the exponent) as a zstd frame.

    Put together here and not by blosc, whose zstd levels all spend bits and time on chance matches; any
    blosc reads it. `benchmarks/bench_codec.py` compares them.
    """
    high = _entropy_coder().compress((chunk >> 8).astype(np.uint8).data)
    low = chunk.astype(np.uint8).tobytes()
    if chunk.size < _BLOSC_SPLITTABLE or len(high) + 12 > chunk.size:  # 12: sizes and offset
        body, flags = np.ascontiguousarray(chunk).tobytes(), _BLOSC_STORED
    else:
        streams = [struct.pack("<I", len(stream)) + stream for stream in (low, high)]
        body, flags = b"".join([struct.pack("<I", _BLOSC_HEAD.size + 4), *streams]), _BLOSC_SHUFFLED_ZSTD
    head = _BLOSC_HEAD.pack(2, 1, flags, 2, chunk.nbytes, chunk.nbytes, _BLOSC_HEAD.size + len(body))
    return head + body


def _entropy_coder() -> ZstdCompressor:
    """This thread's compressor: 64 places for hashes find hardly a match, so Huffman codes remain."""
    if not hasattr(_LOCAL, "compressor"):
        parameters = ZstdCompressionParameters(
            strategy=STRATEGY_FAST, window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7
        )
        _LOCAL.compressor = ZstdCompressor(compression_params=parameters)
    compressor: ZstdCompressor = _LOCAL.compressor
    return compressor


def _zstd_content_size(frame: memoryview) -> int:
    """Decoded size that a zstd frame states (RFC 8878, 3.1.1.1); the decoder alone accepts fewer bytes."""
    if len(frame) < 6 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        raise DamagedCacheError("a chunk is not a zstd frame")
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _check_size(found: int, out: Array) -> None:
    if found != out.nbytes:
        raise DamagedCacheError(f"a chunk holds {found} bytes, expected {out.nbytes}")


def _round_up_to_half(step: Floats) -> tuple[Scales, Floats]:
    """The smallest float16 that is not below `step` >= 0, and its value; inf where there is none.

    The next float16 is the next integer of its bits; numpy's own arithmetic on float16 is slow.
    """
    with np.errstate(over="ignore"):
        half = step.astype(np.float16)
    half.view(np.uint16)[...] += half.astype(np.float32) < step
    return half, half.astype(np.float32)
