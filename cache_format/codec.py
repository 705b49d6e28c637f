"""Values to stored numbers and back, and stored numbers to bytes and back.

int8: a block of 64 channels of one token shares one step, `rms / divisor` but at least `absmax / 127`, so
that nothing is ever clipped; massive activations cost their own block its precision and no other.
bf16: the bits themselves, kept as uint16.

Chunks become bytes through codecs that every Zarr v3 reader has: zstd with its checksum for int8 codes
and scales, and blosc (bit-shuffle, lz4) followed by crc32c for bf16.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google_crc32c import value as crc32c
from numcodecs import Blosc, Zstd, blosc

from .errors import CacheError, DamagedCacheError
from .layout import BLOCK, n_blocks

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint16]
Scales = npt.NDArray[np.float16]
Array = npt.NDArray[Any]

blosc.use_threads = False  # one decoder a thread: its global pool would serialise our threads

_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE)

ZSTD_JSON = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
BYTES_JSON = {"name": "bytes", "configuration": {"endian": "little"}}
ONE_BYTE_JSON = {"name": "bytes"}
CRC32C_JSON = {"name": "crc32c"}
BLOSC_JSON = {
    "name": "blosc",
    "configuration": {"typesize": 2, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0},
}


class Quantised(NamedTuple):
    codes: npt.NDArray[np.int8]
    """(token, d_model), -127 to 127"""
    scale: Scales
    """(token, block): the step of each block"""


def quantise(values: Floats, divisor: float) -> Quantised:
    """int8 codes and float16 steps of `values` (token, d_model); |code * step - value| <= step / 2.

    Raises CacheError where a value is not finite, or so large that its step overflows float16.
    """
    blocks = _in_blocks(values)  # (token, block, BLOCK)
    peak = np.abs(blocks).max(axis=2)
    widths = np.full(blocks.shape[1], BLOCK, np.float32)
    widths[-1] = values.shape[1] - BLOCK * (blocks.shape[1] - 1)
    rms = np.sqrt(np.einsum("tbc,tbc->tb", blocks, blocks) / widths)
    step = np.maximum(rms / np.float32(divisor), peak / np.float32(127))
    scale = _round_up_to_half(step)
    if not np.isfinite(scale).all():
        raise CacheError(
            "an activation is not finite, or beyond 8.3e6, which int8 blocks cannot hold; "
            "look at the sample, or harvest with --precision bf16"
        )
    inverse = np.zeros_like(step)
    np.divide(1, scale, out=inverse, where=scale > 0, dtype=np.float32)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return Quantised(codes.reshape(len(values), -1)[:, : values.shape[1]], scale)


def dequantise(codes: npt.NDArray[np.int8], scale: Scales) -> Floats:
    """float32 values of `codes` (token, d_model) with `scale` (token, block)."""
    per_channel = np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : codes.shape[1]]
    return codes * per_channel


def to_bf16_bits(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even); a NaN stays a NaN with its upper payload."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = np.isnan(values)
    if is_nan.any():
        kept = bits >> np.uint32(16)
        quiet = np.where(kept & np.uint32(0x7F), kept, kept | np.uint32(0x40))
        rounded = np.where(is_nan, quiet, rounded)
    return rounded.astype(np.uint16)


def from_bf16_bits(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_chunk(chunk: Array) -> bytes:
    """Stored bytes of one chunk; uint16 is bf16 bits, every other dtype goes through zstd."""
    if chunk.dtype == np.uint16:
        packed: bytes = _BLOSC.encode(np.ascontiguousarray(chunk))
        return packed + crc32c(packed).to_bytes(4, "little")
    framed: bytes = _ZSTD.encode(np.ascontiguousarray(chunk))
    return framed


def decode_chunk(stored: memoryview, out: Array) -> None:
    """Fill the contiguous array `out` from the stored bytes; DamagedCacheError on any altered byte."""
    try:
        if out.dtype == np.uint16:
            packed, check = stored[:-4], int.from_bytes(stored[-4:], "little")
            if crc32c(bytes(packed)) != check:
                raise DamagedCacheError("the chunk's crc32c does not match")
            _check_size(int.from_bytes(packed[4:8], "little"), out)
            _BLOSC.decode(packed, out)
        else:
            _check_size(_zstd_content_size(stored), out)
            _ZSTD.decode(stored, out)
    except (RuntimeError, ValueError) as fault:
        raise DamagedCacheError(f"a chunk does not decode: {fault}") from fault


def _zstd_content_size(frame: memoryview) -> int:
    """Decoded size that a zstd frame states (RFC 8878, 3.1.1.1); the decoder alone would accept fewer bytes."""
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


def _in_blocks(values: Floats) -> Floats:
    tokens, d_model = values.shape
    blocks = n_blocks(d_model)
    if d_model % BLOCK:
        padded = np.zeros((tokens, blocks * BLOCK), np.float32)
        padded[:, :d_model] = values
        values = padded
    return values.reshape(tokens, blocks, BLOCK)


def _round_up_to_half(step: Floats) -> Scales:
    """The smallest float16 that is not below `step`; inf where there is none."""
    with np.errstate(over="ignore"):
        half = step.astype(np.float16)
        return np.where(half < step, np.nextafter(half, np.float16(np.inf)), half)
