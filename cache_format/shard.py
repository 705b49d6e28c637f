"""One shard file: the chunks of one window and one layer, and behind them an index of where each lies.

Zarr's `sharding_indexed` layout: chunk bytes in token order, then for each chunk two little-endian uint64
(offset, size; both 2**64 - 1 for a chunk that was not written), then the crc32c of the index.
"""

import errno
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google_crc32c import value as crc32c

from .codec import Frames, Stored, decode_chunk
from .errors import DamagedCacheError

_ABSENT = np.uint64(2**64 - 1)
_PLACE = struct.Struct("<QQ")
_NOWHERE = (2**64 - 1, 2**64 - 1)
_LOCAL = threading.local()

NEAR = 1 << 16
"""Bytes between two chunks up to which one call for both costs less than two: scales are small."""


def shard_parts(frames: Iterable[Frames], slots: int) -> Iterator[Stored]:
    """A shard with `slots` places, of which the first are filled: chunks as they come, then the index."""
    index, sizes = np.full((slots, 2), _ABSENT, "<u8"), list[int]()
    for some in frames:
        sizes += some.sizes
        yield from some.parts
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    footer = index.tobytes()
    yield footer + crc32c(footer).to_bytes(4, "little")


def index_bytes(slots: int) -> int:
    """Length of the index at the end of a shard."""
    return 16 * slots + 4


def index_is_sound(stored: bytes) -> bool:
    """Whether its crc32c matches."""
    return bool(crc32c(stored[:-4]) == int.from_bytes(stored[-4:], "little"))


def parse_index(stored: bytes, body: int) -> npt.NDArray[np.uint64]:
    """(slot, 2): offset and size of each chunk in the `body` bytes before the index; 0, 0 where absent."""
    if not index_is_sound(stored):
        raise DamagedCacheError("the index's crc32c does not match")
    index = np.frombuffer(stored[:-4], "<u8").reshape(-1, 2).copy()
    index[(index == _ABSENT).all(axis=1)] = 0
    starts, sizes = index.T
    if (starts > body).any() or (sizes > body - np.minimum(starts, body)).any():
        raise DamagedCacheError("the index points outside the file")
    return index


class Shard:
    """An open shard: the index's checksum is looked at once, chunks are decoded where they lie.

    `io` is "mmap" (decode from the page cache without a copy) or "pread" (one read a chunk; for network
    file systems, where page faults are slow). Thread-safe. Takes one file of those that a process may open
    (with mmap two), and as memory the index, 16 bytes a chunk.
    """

    def __init__(self, path: str | Path, slots: int, io: str = "mmap") -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedCacheError(f"{path} is missing; copy it again or harvest again") from None
        weakref.finalize(self, os.close, descriptor)
        size = os.fstat(descriptor).st_size
        self._body = size - index_bytes(slots)
        if self._body < 0:
            raise DamagedCacheError(
                f"{path} is cut short: {size} bytes cannot hold an index of {slots} chunks"
            )
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._index = bytes(self._bytes(self._body, index_bytes(slots)))
        if not index_is_sound(self._index):
            raise DamagedCacheError(f"{path}: the index's crc32c does not match; copy the file again")
        if io == "mmap":
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_RANDOM)  # no reading around a fault: `will_need` says what comes

    def decode(self, slot: int, out: npt.NDArray[Any]) -> int:
        """Fill the contiguous array `out` with chunk `slot`; its stored bytes.

        DamagedCacheError names file and chunk.
        """
        stored = self.stored(slot)
        try:
            decode_chunk(stored, out)
            return len(stored)
        except DamagedCacheError as fault:
            raise DamagedCacheError(f"{self.path}, chunk {slot}: {fault}; copy the file again") from fault

    def stored(self, slot: int) -> memoryview:
        """Stored bytes of chunk `slot`, unchecked; valid until this thread's next call."""
        return self._bytes(*self._place(slot))

    def copies(self, slots: Sequence[int]) -> list[bytes]:
        """Stored bytes of these chunks, unchecked; in one read where they lie together."""
        places = [self._place(slot) for slot in slots]
        first, end = min(start for start, _ in places), max(start + size for start, size in places)
        if end - first > NEAR:
            return [bytes(self._bytes(*place)) for place in places]
        together = self._bytes(first, end - first)
        return [bytes(together[start - first : start - first + size]) for start, size in places]

    def will_need(self, slots: Iterable[int]) -> None:
        """Have the kernel fetch these chunks while others are decoded."""
        for start, end in _joined(self._place(slot) for slot in slots):
            if self._map is None:
                os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
            else:
                page = start - start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def at_hand(self, slot: int) -> bool:
        """Whether a read of this chunk would begin without waiting; False where that cannot be known."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], self._place(slot)[0], os.RWF_NOWAIT) == 1
        except OSError as fault:
            if fault.errno in (errno.EAGAIN, errno.EOPNOTSUPP):  # not at hand; this file system does not say
                return False
            raise DamagedCacheError(f"{self.path}: cannot be read: {fault.strerror}") from fault

    def _place(self, slot: int) -> tuple[int, int]:
        """(offset, bytes) of a chunk, inside the file."""
        start, size = _PLACE.unpack_from(self._index, slot * _PLACE.size)
        if size == 0 or (start, size) == _NOWHERE:
            raise DamagedCacheError(f"{self.path}, chunk {slot}: was never written; copy the file again")
        if start + size > self._body:
            raise DamagedCacheError(f"{self.path}, chunk {slot}: the index points outside the file")
        return start, size

    def _bytes(self, start: int, size: int) -> memoryview:
        if self._map is not None:
            return memoryview(self._map)[start : start + size]
        data, found = _scratch(start, size), 0
        while found < size:
            read = self._read(data[found:], start + found)
            if not read:
                raise DamagedCacheError(
                    f"{self.path} is cut short: expected {size} bytes at {start}, read {found}"
                )
            found += read
        return data

    def _read(self, room: memoryview, start: int) -> int:
        try:
            return os.preadv(self._descriptor, [room], start)
        except OSError as fault:
            raise DamagedCacheError(f"{self.path}: cannot be read: {fault.strerror}") from fault


def _joined(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, end) of stretches that hold all of these (start, size), which may be NEAR each other."""
    begin, end = -1, -1
    for start, size in sorted(places):
        if begin < 0:
            begin = start
        elif start > end + NEAR:
            yield begin, end
            begin = start
        end = max(end, start + size)
    if begin >= 0:
        yield begin, end


def _scratch(start: int, size: int) -> memoryview:
    """This thread's room for stored bytes from `start` of a file: new memory costs a page fault every 4 KiB.

    It lies in its page as the bytes do in theirs, for the reason that `files.BUFFER` gives."""
    lead = start % mmap.PAGESIZE
    if len(getattr(_LOCAL, "scratch", b"")) < lead + size:
        _LOCAL.scratch = mmap.mmap(-1, lead + size + size // 2)  # a little more will be asked for next
    return memoryview(_LOCAL.scratch)[lead : lead + size]
