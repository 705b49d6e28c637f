"""The order that uses a few windows at a time: every token once, a bounded number of windows, and its m."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import write_planted

from clt.train.order import ReadOrder, measured_partners, predicted_partners
from clt.train.reader import Reader
from clt.train.source import Source
from clt.train.window_groups import WindowGroups


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=20).map(tuple),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_every_chunk_once_and_two_groups_in_use(
    chunks_of: tuple[int, ...], size: int, buffer: int, epoch: int
) -> None:
    """Of any cache, any group and any buffer; what a buffer reads is in use, and at most two groups are."""
    groups = WindowGroups(chunks_of, size, seed=5)
    order = ReadOrder(sum(chunks_of), buffer * 64, seed=5, groups=groups)
    window_of = np.repeat(np.arange(len(chunks_of)), chunks_of)
    seen: list[int] = []
    for number in range(order.n_buffers):
        chunks = order.chunks(epoch, number)
        now, ahead = (set(windows.tolist()) for windows in order.windows_in_use(epoch, number))
        assert set(window_of[chunks]) <= now
        if len(chunks) <= min(chunks_of) * max(1, len(chunks_of) // groups.n_groups):
            assert len(now) + len(ahead) <= 2 * size  # a buffer that is longer than a group needs more
        seen += chunks.tolist()
    assert sorted(seen) == list(range(sum(chunks_of)))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        ReadOrder(80, 640, seed, groups=WindowGroups((8,) * 10, 3, seed)).chunks(epoch, 0).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(sorted(order)) for order in orders}) == 4


@pytest.mark.parametrize("size", [1, 3])
def test_m_is_that_of_a_cache_as_long_as_a_group(size: int, tmp_path) -> None:
    """Measured over an epoch, samples of 50 tokens, windows of 512."""
    source = Source([write_planted(tmp_path / "c", 12 * 512)], "train")
    batch, found = 256, []
    with Reader(source, buffer_tokens=512, seed=0, threads=1, shuffle_windows=size) as reader:
        tokens = []
        for _ in range(source.n_tokens // batch):
            read = reader.next(batch)
            tokens += read.token.tolist()
            found.append(measured_partners(source.sample[read.token]))
    assert sorted(tokens) == list(range(source.n_tokens))
    predicted = predicted_partners(batch, 50, source.n_tokens, 512, 512, shuffle_windows=size)
    assert np.mean(found) == pytest.approx(predicted, rel=0.1)
    assert predicted > predicted_partners(batch, 50, source.n_tokens, 512, 512)
