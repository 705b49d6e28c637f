"""The order of reading and how well it shuffles: each chunk once, few tokens of one sample in a batch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import write_cache
from topics import write_topics

from clt.cache_format.layout import CHUNK
from clt.cache_format.permutation import permutation
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.order import ReadOrder, measured_partners, perfect_partners, predicted_partners
from clt.train.reader import Reader
from clt.train.source import Source


@settings(deadline=None)
@given(st.integers(1, 800), st.sampled_from([64, 640, 8192]), st.integers(0, 3))
def test_buffers_partition_the_epoch(n_chunks: int, buffer: int, epoch: int) -> None:
    """Each chunk in exactly one buffer; no buffer over its size, none much smaller than the others."""
    order = ReadOrder(n_chunks, buffer, seed=3)
    sizes, seen = [], []
    for number in range(order.n_buffers):
        chunks = order.chunks(epoch, number)
        sizes.append(len(chunks))
        seen += chunks.tolist()
    assert sorted(seen) == list(range(n_chunks))
    assert max(sizes) <= max(1, buffer // 64)
    assert max(sizes) - min(sizes) <= 1


def test_measured_partners_by_hand() -> None:
    """Samples of 3, 2 and 1 tokens: (3*2 + 2*1 + 0) / 6."""
    assert measured_partners(np.array([7, 8, 7, 9, 7, 8], np.int32)) == pytest.approx(8 / 6)


def stream(n_tokens: int, per_sample: int, window: int, buffer: int, share: float) -> Iterator[np.ndarray]:
    """Sample numbers of the tokens that count, epoch after epoch, as a reader serves its buffers."""
    disk = np.arange(n_tokens) // per_sample
    for number, start in enumerate(range(0, n_tokens, window)):
        part = disk[start : start + window]
        disk[start : start + window] = part[permutation(len(part), 0, number)]
    chosen = np.random.default_rng(0).random(n_tokens) < share
    order = ReadOrder(-(-n_tokens // CHUNK), buffer, seed=1)
    for epoch in range(1000):
        for number in range(order.n_buffers):
            chunks = order.chunks(epoch, number)
            tokens = (CHUNK * chunks[:, None] + np.arange(CHUNK)).ravel()
            tokens = tokens[tokens < n_tokens]
            tokens = tokens[chosen[tokens]]
            yield disk[tokens[order.shuffled(len(tokens), epoch, number)]]


DEMO = (30_720, 118, 4096, 8192, 4096, 1.0)


@pytest.mark.parametrize(
    ("n_tokens", "per_sample", "window", "buffer", "batch", "share"),
    [
        DEMO,
        (30_720, 118, 16_384, 8192, 4096, 0.9),  # the defaults, some kinds left out
        (30_720, 118, 4096, 8192, 512, 0.75),
        (60_000, 600, 1024, 2048, 2048, 1.0),  # every batch from two buffers
        (60_000, 600, 4096, 2048, 8192, 1.0),  # a batch larger than the buffer
        (60_000, 600, 512, 1024, 700, 1.0),  # samples longer than windows, batches across buffers
        (60_000, 200, 60_000, 1024, 1000, 0.5),
        (9_000, 90, 1024, 8192, 1500, 1.0),  # two buffers an epoch
        (9_000, 90, 640, 640, 640, 1.0),
    ],
)
def test_predicted_partners_are_those_of_the_order(
    n_tokens: int, per_sample: int, window: int, buffer: int, batch: int, share: float
) -> None:
    """m by the formula and by counting in half a million tokens of the stream, within 5 %."""
    pending, measured = np.zeros(0, int), []
    for samples in stream(n_tokens, per_sample, window, buffer, share):
        pending = np.concatenate([pending, samples])
        while len(pending) >= batch:
            measured.append(measured_partners(pending[:batch]))
            pending = pending[batch:]
        if len(measured) * batch > 500_000:
            break
    chosen = np.random.default_rng(0).random(n_tokens) < share
    of_sample = np.bincount(np.arange(n_tokens)[chosen] // per_sample)
    tokens_per_sample = float((of_sample**2).sum() / of_sample.sum())
    found = predicted_partners(batch, tokens_per_sample, int(chosen.sum()), window, buffer, n_tokens)
    assert np.mean(measured) == pytest.approx(found, rel=0.05)


def test_a_perfect_shuffle_by_counting() -> None:
    samples = np.arange(10_000) // 50
    rng = np.random.default_rng(0)
    measured = [measured_partners(rng.permutation(samples)[:1000].astype(np.int32)) for _ in range(200)]
    assert np.mean(measured) == pytest.approx(perfect_partners(1000, 50, 10_000), rel=0.02)


@pytest.mark.parametrize("window", [4096, 16_384])
def test_the_defaults_shuffle_within_twice_of_perfect(tmp_path: Path, window: int) -> None:
    """A cache of the demo's shape, with its window and with the default one, read as `clt train` does."""
    tokens, per_sample, *_ = DEMO
    config = TrainConfig(
        caches=(write_cache(tmp_path / "c", tokens, window, per_sample),),
        run=tmp_path / "run",
        transcoder=TranscoderConfig(),
    )
    source, batch = Source(config.caches, "train"), config.batch_tokens
    with Reader(source, buffer_tokens=config.buffer_tokens, seed=config.seed) as reader:
        measured = [
            measured_partners(source.sample[reader.next(batch).token]) for _ in range(5 * tokens // batch)
        ]
    perfect = perfect_partners(batch, source.tokens_per_sample, tokens)
    predicted = predicted_partners(batch, source.tokens_per_sample, tokens, window, config.buffer_tokens)
    assert np.mean(measured) == pytest.approx(predicted, rel=0.05)
    assert np.mean(measured) < 2 * perfect


def test_shuffled_training_is_better_on_held_out_tokens(tmp_path: Path) -> None:
    """Samples of one topic each, topic after topic: read so, the last are learnt and the others lost."""
    cache, fvu = write_topics(tmp_path / "c"), {}
    for order in ("shuffled", "sequential"):
        config = TrainConfig(
            caches=(cache,),
            run=tmp_path / order,
            transcoder=TranscoderConfig(k=4, latents=96, n_targets=2),
            order=order,
            batch_tokens=128,
            buffer_tokens=2048,
            lr=1e-2,
            lr_schedule="constant",
            threads=1,
        )
        train(config)
        fvu[order] = evaluate(load_transcoder(config.run), open_source(config, "val")).fvu.mean()
    assert fvu["shuffled"] < 0.5 * fvu["sequential"]
