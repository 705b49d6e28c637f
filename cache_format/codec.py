"""Chunks to bytes and back, through codecs that every Zarr v3 reader has.

zstd with its checksum for int8 codes (of which Huffman codes alone are made), scales and statistics; for bf16
blosc (byte shuffle, zstd) and crc32c.
"""

import struct
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google_crc32c import extend as add_to_crc32c
from google_crc32c import value as crc32c
from numcodecs import Blosc, Zstd, blosc
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError

from .errors import DamagedCacheError
from .huffman import encode_noise
from .per_thread import PerThread

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Stored = bytes | memoryview


class Frames(NamedTuple):
    """Stored bytes of some chunks, one behind the other."""

    sizes: list[int]
    """Of each chunk, in bytes."""
    parts: list[Stored]
    """All of them, cut anywhere."""


SMALL = 1 << 16
"""Bytes of a chunk up to which a context that is kept, and a copy, are faster than a new one each time."""

blosc.use_threads = False  # one decoder a thread: its global pool would serialise our threads

_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)  # reads what `encode_planes` writes
_BLOSC_HEAD = struct.Struct("<4B3I")
_BLOSC_SHUFFLED_ZSTD, _BLOSC_STORED = 0x81, 0x03
_BLOSC_SPLITTABLE = 128  # blosc reads no shorter streams
_compressor = PerThread(partial(ZstdCompressor, level=1, write_checksum=True, write_content_size=True))
_decompressor = PerThread(ZstdDecompressor)

ZSTD_JSON = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
BYTES_JSON = {"name": "bytes", "configuration": {"endian": "little"}}
ONE_BYTE_JSON = {"name": "bytes"}
CRC32C_JSON = {"name": "crc32c"}
BLOSC_JSON = {
    "name": "blosc",
    "configuration": {"typesize": 2, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0},
}


def encode_chunk(chunk: Array) -> bytes:
    """Stored bytes of one chunk; uint16 is bf16 bits, every other dtype goes through zstd."""
    if chunk.dtype == np.uint16:
        low, high = planes(chunk)
        return b"".join(encode_planes(low[None], high[None]).parts)
    return b"".join(encode_chunks(chunk[None]).parts)


def encode_chunks(chunks: Array) -> Frames:
    """As `encode_chunk`, of the chunks (chunk, ...), which are not bf16, in one call."""
    if chunks.dtype == np.int8:
        sizes, data = encode_noise(chunks, checksum=True)
        return Frames(sizes, [data])
    frames = _compress(_compressor(), chunks)
    # few parts: what Python does for each takes as long as encoding a small frame
    return Frames([len(frame) for frame in frames], frames if len(frames) == 1 else [b"".join(frames)])


def _compress(compressor: ZstdCompressor, chunks: Array) -> list[Stored]:
    """A frame each; one call for all, for a call changes the thread that Python runs."""
    if len(chunks) == 1:
        return [compressor.compress(np.ascontiguousarray(chunks[0]).data)]
    frames = compressor.multi_compress_to_buffer([np.ascontiguousarray(chunk).data for chunk in chunks])
    return [memoryview(frames[nth]) for nth in range(len(frames))]  # type: ignore[arg-type]  # it is a buffer


def planes(chunk: Array) -> tuple[Bytes, Bytes]:
    """Low and high bytes of uint16s, flat."""
    low, high = np.ascontiguousarray(chunk).reshape(-1, 1).view(np.uint8).T
    return np.ascontiguousarray(low), np.ascontiguousarray(high)


def encode_planes(low: Bytes, high: Bytes) -> Frames:
    """Of each chunk's bytes (chunk, ...): a blosc container of one block, and its crc32c: the low bytes (last
    bit of the exponent, mantissa) as they are, for they are noise, then the high bytes (sign and the rest of
    the exponent) as a zstd frame.

    Put together here and not by blosc, whose zstd levels all spend bits and time on chance matches; any
    blosc reads it. `benchmarks/bench_codec.py` compares them.
    """
    sizes, frames = encode_noise(high, checksum=False)
    ends = accumulate(sizes)
    chunks = [
        _checked(_container(of_low.reshape(-1), of_high.reshape(-1), memoryview(frames)[end - size : end]))
        for of_low, of_high, size, end in zip(low, high, sizes, ends, strict=True)
    ]
    return Frames([sum(map(len, parts)) for parts in chunks], [part for parts in chunks for part in parts])


def _container(low: Bytes, high: Bytes, frame: Stored) -> tuple[Stored, ...]:
    size, start = low.size, _BLOSC_HEAD.size
    if size < _BLOSC_SPLITTABLE or len(frame) + 12 > size:  # 12: sizes and offset
        stored = start + 2 * size
        head = _BLOSC_HEAD.pack(2, 1, _BLOSC_STORED, 2, 2 * size, 2 * size, stored)
        return head, np.column_stack([low, high]).tobytes()
    stored = start + 12 + size + len(frame)
    head = _BLOSC_HEAD.pack(2, 1, _BLOSC_SHUFFLED_ZSTD, 2, 2 * size, 2 * size, stored)
    return head + struct.pack("<II", start + 4, size), low.data, struct.pack("<I", len(frame)), frame


def _checked(parts: tuple[Stored, ...]) -> tuple[Stored, ...]:
    check = 0
    for part in parts:
        check = add_to_crc32c(check, part if isinstance(part, bytes) else np.frombuffer(part, np.uint8))
    return (*parts, check.to_bytes(4, "little"))


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
    data = _decompressor().decompress(stored, allow_extra_data=False)
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def _checked_blosc(stored: memoryview, out: Array) -> memoryview:
    """The container without its crc32c, once that and its header are found to be what we write."""
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
