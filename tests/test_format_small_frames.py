"""Many frames at once are what they are one by one, or are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format import DamagedCacheError, small_frames
from clt.cache_format.codec import decode_chunk, encode_chunk

SHAPE = (64, 5)


def frames_of(chunks: np.ndarray) -> list[bytes]:
    return [encode_chunk(chunk) for chunk in chunks]


@given(n=st.integers(1, 9), at_once=st.sampled_from([1, 640, 1300, 1 << 18]), data=st.data())
def test_frames_go_where_they_belong(n: int, at_once: int, data: st.DataObject) -> None:
    """Any number of them, in any order, however many a call takes; other places stay as they are."""
    chunks = np.random.default_rng(n).standard_normal((n, *SHAPE)).astype(np.float16)
    places = data.draw(st.permutations(range(n + 2)))[:n]
    out = np.full((n + 2, *SHAPE), 7, np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_frames, "AT_ONCE", at_once)
        assert small_frames.decode_frames(frames_of(chunks), out, places)
    np.testing.assert_array_equal(out[places], chunks)
    assert (np.delete(out, places, axis=0) == 7).all()


def test_no_flipped_bit_passes_that_the_reference_refuses() -> None:
    """Each bit of one frame of three in turn: refused, or what the reference makes of it."""
    chunks = np.random.default_rng(0).integers(0, 40, (3, *SHAPE)).astype(np.float16)
    frames, out, alone = frames_of(chunks), np.empty((3, *SHAPE), np.float16), np.empty(SHAPE, np.float16)
    refused = 0
    for bit in range(8 * len(frames[1])):
        damaged = bytearray(frames[1])
        damaged[bit // 8] ^= 1 << bit % 8
        if small_frames.decode_frames([frames[0], bytes(damaged), frames[2]], out, [0, 1, 2]):
            decode_chunk(memoryview(damaged), alone)  # a bit without meaning
            np.testing.assert_array_equal(out, chunks)
        else:
            refused += 1
            with pytest.raises(DamagedCacheError):
                decode_chunk(memoryview(damaged), alone)
    assert refused >= 0.99 * 8 * len(frames[1])


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 4), slice(0, -1), slice(0, 12)])
def test_a_cut_frame_is_refused(cut: slice) -> None:
    frames = frames_of(np.ones((2, *SHAPE), np.float16))
    assert not small_frames.decode_frames(
        [frames[0], frames[1][cut]], np.empty((2, *SHAPE), np.float16), [0, 1]
    )


def test_a_frame_of_another_size_is_refused() -> None:
    """Fewer bytes than the place has, or more."""
    for rows in (63, 65):
        frames = frames_of(np.ones((1, rows, 5), np.float16))
        assert not small_frames.decode_frames(frames, np.empty((1, *SHAPE), np.float16), [0])
