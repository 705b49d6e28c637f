"""One shard file: its index, absent chunks, damage, and both ways to read it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from google_crc32c import value as crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clt.cache_format import CacheError, DamagedCacheError
from clt.cache_format import shard as shard_module
from clt.cache_format.codec import Frames, encode_chunk
from clt.cache_format.open_shards import Fetched, InWindow, Wanted
from clt.cache_format.shard import Shard, shard_parts

IO = pytest.mark.parametrize("io", ["mmap", "pread"])
CHUNKS = [np.full((64, 16), n, np.int8) + np.arange(16, dtype=np.int8) for n in range(3)]
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "c.0.0.0"
        path.write_bytes(data)
        return path

    return write


def footer(index: npt.NDArray[np.uint64]) -> bytes:
    data = index.astype("<u8").tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def decoded(shard: Shard, slot: int) -> npt.NDArray[np.int8]:
    out = np.empty((64, 16), np.int8)
    shard.decode(slot, out)
    return out


ENCODED = [encode_chunk(chunk) for chunk in CHUNKS]
DATA = b"".join(shard_parts([Frames([len(frame) for frame in ENCODED], [*ENCODED])], 4))


@IO
def test_each_chunk_comes_back(put: Callable[[bytes], Path], io: str) -> None:
    """By slot, in any order, from both kinds of io."""
    shard = Shard(put(DATA), 4, io)
    for slot in (2, 0, 1):
        np.testing.assert_array_equal(decoded(shard, slot), CHUNKS[slot])


@IO
@pytest.mark.parametrize("near", [0, 1 << 16])
def test_copies_are_the_stored_bytes(
    put: Callable[[bytes], Path], io: str, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any slots in any order, whether they are read together or one by one."""
    monkeypatch.setattr(shard_module, "NEAR", near)
    shard = Shard(put(DATA), 4, io)
    for slots in ([1], [2, 0], [0, 1, 2]):
        assert shard.copies(slots) == [ENCODED[slot] for slot in slots]


@pytest.mark.parametrize(("near", "asked"), [(0, [(0, 1), (2, 3)]), (1 << 16, [(0, 3)])])
def test_chunks_that_lie_near_are_asked_for_at_once(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, near: int, asked: list[tuple[int, int]]
) -> None:
    """Neighbours in one call always, others where little lies between them."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(shard_module, "NEAR", near)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: calls.append((start, size)))
    shard, ends = Shard(put(DATA), 4, "pread"), np.cumsum([0, *map(len, ENCODED)])
    shard.will_need([2, 0])
    assert calls == [(ends[first], ends[end] - ends[first]) for first, end in asked]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs reads that do not wait")
@IO
def test_what_the_kernel_has_is_known(put: Callable[[bytes], Path], io: str) -> None:
    """What was just written is at hand; once its pages are dropped it is not, until it is read again."""
    path = put(DATA)
    shard = Shard(path, 4, io)
    assert shard.at_hand(0)
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if io == "pread":  # mapped pages stay
        before = shard.at_hand(0)
        shard.copies([0])
        assert (before, shard.at_hand(0)) in [(False, True), (True, True)]  # in memory's own file system
    os.close(descriptor)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_what_cannot_be_known_is_not_at_hand(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    shard = Shard(put(DATA), 4)
    monkeypatch.setattr(os, "preadv", failing(error))
    assert not shard.at_hand(0)


@IO
def test_a_disk_that_fails_when_it_is_looked_at_is_damage(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, io: str
) -> None:
    shard = Shard(put(DATA), 4, io)
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(DamagedCacheError, match="cannot be read: Input/output error"):
        shard.at_hand(0)


def failing(error: int) -> Callable[..., int]:
    def preadv(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    return preadv


@pytest.mark.parametrize("at_hand", [{0: True, 2: True}, {0: True, 2: False}, {0: False, 2: True}])
def test_only_what_is_not_at_hand_is_asked_for(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, at_hand: dict[int, bool]
) -> None:
    """By the first and the last window's codes."""
    shards, asked = [Shard(put(DATA), 4) for _ in range(3)], []
    monkeypatch.setattr(Shard, "at_hand", lambda shard, slot: at_hand[shards.index(shard)])
    monkeypatch.setattr(Shard, "will_need", lambda shard, slots: asked.append((shards.index(shard), slots)))
    Fetched(("", ""), [Wanted([shard], InWindow(0, [1, 2], [0, 1])) for shard in shards]).ask()
    assert asked == ([] if all(at_hand.values()) else [(n, [1, 2]) for n in range(3)])


def test_the_layout_is_zarrs() -> None:
    """Chunks in order, then (offset, size) in little-endian uint64, all ones where absent, then crc32c."""
    sizes = [len(frame) for frame in ENCODED]
    index = np.full((4, 2), 2**64 - 1, np.uint64)
    index[:3] = [[sum(sizes[:n]), sizes[n]] for n in range(3)]
    assert b"".join(ENCODED) + footer(index) == DATA


@IO
def test_an_absent_chunk_is_damage(put: Callable[[bytes], Path], io: str) -> None:
    """A slot that was never written cannot be read, nor asked for."""
    shard = Shard(put(DATA), 4, io)
    with pytest.raises(DamagedCacheError, match=r"c\.0\.0\.0, chunk 3: was never written"):
        decoded(shard, 3)
    with pytest.raises(DamagedCacheError, match=r"c\.0\.0\.0, chunk 3: was never written"):
        shard.will_need([3])


@IO
def test_a_missing_file_is_damage(tmp_path: Path, io: str) -> None:
    """The message names it and says what to do."""
    with pytest.raises(DamagedCacheError, match=r"c\.9 is missing; copy it again or harvest again"):
        Shard(tmp_path / "c.9", 4, io)


@IO
@pytest.mark.parametrize("keep", [0, 1, 60, 67, 68, len(DATA) - 1])
def test_a_truncated_file_is_damage(put: Callable[[bytes], Path], io: str, keep: int) -> None:
    """However little is left, opening says so."""
    with pytest.raises(DamagedCacheError, match=r"cut short|crc32c does not match"):
        Shard(put(DATA[:keep]), 4, io)


@IO
def test_any_flipped_bit_is_found(put: Callable[[bytes], Path], io: str) -> None:
    """In the index at open, in a chunk when it is decoded, and no other chunk suffers."""
    for bit in range(0, 8 * len(DATA), 11):
        altered = bytearray(DATA)
        altered[bit // 8] ^= 1 << bit % 8
        path = put(bytes(altered))
        if bit // 8 >= len(DATA) - 68:
            with pytest.raises(DamagedCacheError, match=r"c\.0\.0\.0: the index's crc32c"):
                Shard(path, 4, io)
            continue
        shard, wrong = Shard(path, 4, io), 0
        for slot, chunk in enumerate(CHUNKS):
            try:
                np.testing.assert_array_equal(decoded(shard, slot), chunk)
            except DamagedCacheError as fault:
                wrong += 1
                if f"c.0.0.0, chunk {slot}: " not in str(fault):
                    raise
        assert wrong <= 1


def test_a_disk_that_fails_is_named(put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error has no file in it: at open and at a chunk, ours does."""
    path, shard = put(DATA), Shard(put(DATA), 4, "pread")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for use in (lambda: Shard(path, 4), lambda: decoded(shard, 0)):
        with pytest.raises(DamagedCacheError, match=r"c\.0\.0\.0: cannot be read: Input/output error"):
            use()


def test_short_reads_are_continued(put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may give fewer bytes than it has; a file that lost its end gives none."""
    path = put(DATA)
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: plain(file, [buffers[0][:7]], at))
    shard = Shard(path, 4, "pread")
    np.testing.assert_array_equal(decoded(shard, 1), CHUNKS[1])
    os.truncate(path, 5)
    with pytest.raises(DamagedCacheError, match=r"c\.0\.0\.0 is cut short: expected \d+ bytes at 0, read 5"):
        decoded(shard, 0)


@pytest.mark.parametrize(
    "place", [(0, 2**63), (2**64 - 1, 5), (10**6, 1), (0, 10**6), (2**64 - 8, 16), (3, 2**64 - 2)]
)
def test_an_index_that_points_outside_is_damage(put: Callable[[bytes], Path], place: tuple[int, int]) -> None:
    """Also where offset + size wraps around 2**64; nothing is read or allocated there."""
    path = put(b"x" * 40 + footer(np.array([place], np.uint64)))
    shard = Shard(path, 1)
    for use in (lambda: decoded(shard, 0), lambda: shard.will_need([0])):
        with pytest.raises(
            DamagedCacheError, match=r"c\.0\.0\.0, chunk 0: the index points outside the file"
        ):
            use()


@IN_ONE_FOLDER
@given(
    st.binary(max_size=60), st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 60), min_size=4, max_size=4)
)
def test_any_file_is_a_shard_or_a_cache_error(
    put: Callable[[bytes], Path], body: bytes, words: list[int]
) -> None:
    """Whatever body and index a stranger signs, opening and decoding give numbers or a CacheError."""
    path = put(body + footer(np.array(words, np.uint64).reshape(2, 2)))
    for io in ("mmap", "pread"):
        try:
            shard = Shard(path, 2, io)
        except CacheError:
            continue
        for slot in range(2):
            with pytest.raises(CacheError):
                decoded(shard, slot)


@IN_ONE_FOLDER
@given(st.binary(max_size=120), st.integers(1, 8))
def test_any_bytes_are_no_shard(put: Callable[[bytes], Path], data: bytes, slots: int) -> None:
    """Bytes without a right index are refused."""
    with pytest.raises(CacheError):
        Shard(put(data), slots)


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.integers(0, 3), st.integers(0, 5))
def test_building_fills_the_first_slots(chunks: list[bytes], spare: int, cut: int) -> None:
    """Every chunk lies where the index says, back to back; what is left over is absent."""
    slots = len(chunks) + spare
    frames = [
        Frames([len(chunk) for chunk in some], [b"".join(some)]) for some in (chunks[:cut], chunks[cut:])
    ]
    data = b"".join(shard_parts(frames, slots))
    index = np.frombuffer(data[len(data) - 4 - 16 * slots : -4], "<u8").reshape(slots, 2)
    for chunk, (start, size) in zip(chunks, index.tolist(), strict=False):
        assert data[start : start + size] == chunk
    assert (index[len(chunks) :] == 2**64 - 1).all()
    assert len(data) == sum(map(len, chunks)) + 16 * slots + 4
