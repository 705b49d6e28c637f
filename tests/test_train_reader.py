"""The order of reading: every token once an epoch, whatever the sizes, threads, and interruptions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clt.cache_format import CacheError, CacheWriter, Manifest
from clt.train.order import ReadOrder, measured_partners, predicted_partners
from clt.train.reader import Reader
from clt.train.source import Selection, Source

LAYERS, WIDTH = 2, 8


def write_cache(
    path: Path, n_tokens: int, window: int = 128, per_sample: int = 10, seed: int = 0, val: int = 0
) -> Path:
    """A cache whose mlp_in holds each token's own number, so that a batch can be told apart."""
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="bf16",
        step_divisor=0,
        window=window,
        seed=seed,
        world_size=1,
        source={"model": "fake"},
    )
    with CacheWriter(path, manifest, threads=1) as writer:
        for split, total in (("train", n_tokens), ("val", val)):
            for first in range(0, total, per_sample):
                number = np.arange(first, min(first + per_sample, total))
                columns = {
                    "sample": np.full(len(number), first // per_sample),
                    "position": number,
                    "token_id": number,
                    "kind": (number % 3 == 0).astype(np.uint8),
                    "row": np.full(len(number), -1),
                    "col": np.full(len(number), -1),
                }
                digits = np.stack(
                    [number % 100, number // 100, number * 0 + 1, *[number * 0] * (WIDTH - 3)], axis=1
                )
                values = np.repeat(digits[:, None].astype(np.float32), LAYERS, axis=1)
                line = {
                    "sample": first // per_sample + (10**6 if split == "val" else 0),
                    "id": f"{split}{first}",
                }
                writer.add(split, first, line, columns, {"mlp_in": values, "mlp_out": values + 1})
        writer.finish()
    return path


def numbers(batch: Any) -> np.ndarray:
    """The token numbers that the batch's own values spell, checked to agree in every layer and site."""
    import torch

    spelled = []
    for layer in range(LAYERS):
        for site, shift in (("mlp_in", 0), ("mlp_out", 1)):
            values = batch.values(site, layer, torch.device("cpu"), torch.float32).numpy() - shift
            spelled.append((values[:, 0] + 100 * values[:, 1]).astype(int))
    assert all(np.array_equal(spelled[0], other) for other in spelled)
    return spelled[0]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """(tokens, window) -> cache, each written once."""
    made: dict[tuple[int, int], Path] = {}
    root = tmp_path_factory.mktemp("caches")

    def make(n_tokens: int, window: int) -> Path:
        if (n_tokens, window) not in made:
            made[n_tokens, window] = write_cache(root / f"{n_tokens}-{window}", n_tokens, window)
        return made[n_tokens, window]

    return make


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.sampled_from([1, 63, 64, 65, 300, 777]),
    window=st.sampled_from([64, 128, 320]),
    buffer=st.sampled_from([64, 128, 500, 10_000]),
    batch=st.integers(1, 900),
    threads=st.sampled_from([1, 3]),
    chosen=st.sampled_from([Selection(), Selection(exclude=("image",))]),
)
def test_every_chosen_token_once_an_epoch(
    caches: Callable[[int, int], Path],
    n_tokens: int,
    window: int,
    buffer: int,
    batch: int,
    threads: int,
    chosen: Selection,
) -> None:
    """Three epochs cut into batches of any size deliver each chosen token three times, each once an epoch."""
    expected = [n for n in range(n_tokens) if not ("image" in chosen.exclude and n % 3 == 0)]
    assume(expected)
    source, epochs = Source([caches(n_tokens, window)], "train", selection=chosen), 3
    with Reader(source, buffer_tokens=buffer, seed=5, threads=threads) as reader:
        left, stream = epochs * len(expected), []
        while left:
            stream += numbers(reader.next(min(batch, left))).tolist()
            left = epochs * len(expected) - len(stream)
    for epoch in range(epochs):
        part = stream[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(part) == expected
    if len(expected) > 100:
        assert stream[: len(expected)] != stream[len(expected) : 2 * len(expected)]


def test_order_does_not_depend_on_threads_or_io(caches: Callable[[int, int], Path]) -> None:
    def stream(threads: int, io: str) -> list[int]:
        with Reader(
            Source([caches(777, 128)], "train", io=io), buffer_tokens=128, seed=1, threads=threads
        ) as reader:
            return [n for _ in range(9) for n in numbers(reader.next(100)).tolist()]

    assert stream(1, "mmap") == stream(8, "mmap") == stream(3, "pread")


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 1700), batch=st.integers(1, 300))
def test_resuming_continues_the_stream(caches: Callable[[int, int], Path], before: int, batch: int) -> None:
    """A state taken anywhere, mid-buffer, mid-epoch, gives the same bytes afterwards."""
    source = Source([caches(777, 128)], "train")
    with Reader(source, buffer_tokens=128, seed=1) as reader:
        if before:
            reader.next(before)
        state = reader.state()
        expected = [numbers(reader.next(batch)).tolist() for _ in range(3)]
    with Reader(source, buffer_tokens=128, seed=1) as again:
        again.next(7)
        again.restore(state)
        assert [numbers(again.next(batch)).tolist() for _ in range(3)] == expected


def test_state_of_another_cache_seed_or_buffer_is_refused(caches: Callable[[int, int], Path]) -> None:
    with Reader(Source([caches(777, 128)], "train"), buffer_tokens=128, seed=1) as reader:
        state = reader.state()
    for source, buffer, seed, name in [
        (Source([caches(300, 128)], "train"), 128, 1, "fingerprint"),
        (Source([caches(777, 128)], "train"), 256, 1, "buffer_tokens"),
        (Source([caches(777, 128)], "train"), 128, 2, "seed"),
        (Source([caches(777, 128)], "train", selection=Selection(exclude=("bos",))), 128, 1, "selection"),
    ]:
        with (
            Reader(source, buffer_tokens=buffer, seed=seed) as other,
            pytest.raises(ValueError, match=f"was reading another {name}"),
        ):
            other.restore(state)


def test_several_caches_are_read_as_one(tmp_path: Path) -> None:
    """Each token of both once an epoch; samples stay distinct; another identity is refused."""
    first, second = write_cache(tmp_path / "a", 300), write_cache(tmp_path / "b", 200, seed=1)
    source = Source([first, second], "train")
    with Reader(source, buffer_tokens=128, seed=0) as reader:
        batch = reader.next(500)
    assert sorted(numbers(batch).tolist()) == sorted([*range(300), *range(200)])
    assert len(np.unique(source.sample)) == 50
    with pytest.raises(CacheError, match="cannot be read as one; they differ in: window: 128 -> 64"):
        Source([first, write_cache(tmp_path / "c", 100, window=64)], "train")


def test_statistics_over_caches_are_those_of_all_tokens(tmp_path: Path) -> None:
    source = Source([write_cache(tmp_path / "a", 300), write_cache(tmp_path / "b", 200, seed=1)], "train")
    number = np.concatenate([np.arange(300), np.arange(200)])
    found = source.statistics("mlp_in")
    assert found.tokens == 500
    assert found.mean[0, 0] == pytest.approx((number % 100).mean())
    assert found.variance[1] == pytest.approx((number % 100).var() + (number // 100).var())


def test_a_split_without_tokens_is_named(caches: Callable[[int, int], Path]) -> None:
    with pytest.raises(CacheError, match="no tokens in split val; harvest with a larger --val-fraction"):
        Source([caches(300, 128)], "val")


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


def test_predicted_partners_agree_with_what_is_read(tmp_path: Path) -> None:
    """m from the formula and from ten epochs of batches, within 5 %."""
    per_sample, window, buffer, batch, total = 40, 640, 512, 256, 10_240
    source = Source([write_cache(tmp_path / "c", total, window, per_sample)], "train")
    measured = []
    with Reader(source, buffer_tokens=buffer, seed=0) as reader:
        for _ in range(10 * total // batch):
            measured.append(measured_partners(source.sample[reader.next(batch).token]))
    predicted = predicted_partners(batch, source.tokens_per_sample, total, window, buffer)
    assert source.tokens_per_sample == per_sample
    assert np.mean(measured) == pytest.approx(predicted, rel=0.05)
