"""The order of reading: every token once an epoch, whatever the sizes, threads, and interruptions."""

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numbered import numbers, write_cache
from planted import write_planted

from clt.cache_format import CacheError
from clt.train.reader import Batch, Reader
from clt.train.selection import Selection
from clt.train.source import Source


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
    ranks=st.integers(1, 4),
    chosen=st.sampled_from([Selection(), Selection(exclude=("image",))]),
)
def test_every_chosen_token_once_an_epoch(
    caches: Callable[[int, int], Path],
    n_tokens: int,
    window: int,
    buffer: int,
    batch: int,
    threads: int,
    ranks: int,
    chosen: Selection,
) -> None:
    """Three epochs, in batches of any size and by any ranks: each chosen token thrice, each once an epoch."""
    expected = [n for n in range(n_tokens) if not ("image" in chosen.exclude and n % 3 == 0)]
    assume(expected)
    epochs, source = 3, Source([caches(n_tokens, window)], "train", selection=chosen)
    batch = max(batch, n_tokens // 40)  # not too many of them
    stream: list[int] = []
    with ExitStack() as stack:
        readers = [
            stack.enter_context(
                Reader(source, buffer_tokens=buffer, seed=5, threads=threads, rank=rank, world_size=ranks)
            )
            for rank in range(ranks)
        ]
        while left := epochs * len(expected) - len(stream):
            for reader in readers:
                stream += numbers(reader.next(min(batch, left))).tolist()
    for epoch in range(epochs):
        part = stream[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(part) == expected
    if len(expected) > 100:
        assert stream[: len(expected)] != stream[len(expected) : 2 * len(expected)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision: three layers with values of every size."""
    root = tmp_path_factory.mktemp("planted")
    return {kind: write_planted(root / kind, 1300, precision=kind) for kind in ("int8", "bf16")}


def digest(batch: Batch) -> str:
    """Of every byte that is delivered: codes, scales, token numbers."""
    found = hashlib.sha256(batch.token.tobytes())
    for arrays in batch.rows:
        for _, array in sorted(arrays.items()):
            found.update(array.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_bytes_and_order_do_not_depend_on_threads_or_io(planted: dict[str, Path], precision: str) -> None:
    def stream(threads: int, io: str) -> list[str]:
        source = Source([planted[precision]], "train", io=io)
        with Reader(source, buffer_tokens=128, seed=1, threads=threads) as reader:
            return [digest(reader.next(100)) for _ in range(17)]

    assert stream(1, "mmap") == stream(16, "mmap") == stream(3, "pread") == stream(16, "pread")


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    ranks=st.integers(1, 5),
    other=st.integers(1, 5),
    io=st.sampled_from(["mmap", "pread"]),
)
def test_ranks_share_each_batch_and_any_world_resumes_any_other(
    caches: Callable[[int, int], Path], sizes: list[int], ranks: int, other: int, io: str
) -> None:
    """Side by side, shares are the batch of one reader; they differ by a token at most; one state for all."""
    source = Source([caches(777, 128)], "train", io=io)

    def shares(
        world: int, sizes: list[int], state: dict[str, Any] | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """By batch, the ranks' (token, numbers); the state that all ranks agree on."""
        read, states = [], []
        for rank in range(world):
            with Reader(source, buffer_tokens=256, seed=1, threads=2, rank=rank, world_size=world) as reader:
                if state:
                    reader.restore(state)
                batches = [reader.next(size) for size in sizes]
                states.append(reader.state())
            read.append([(batch.token.tolist(), numbers(batch).tolist()) for batch in batches])
        assert states == states[:1] * world
        return list(zip(*read, strict=True)), states[0]

    def whole(parts: list[Any]) -> list[Any]:
        return [[[*chain(*column)] for column in zip(*batch, strict=True)] for batch in parts]

    alone, end = shares(1, sizes, None)
    split, state = shares(ranks, sizes, None)
    assert (whole(split), state) == (whole(alone), end)
    for batch in split:
        lengths = [len(token) for token, _ in batch]
        assert max(lengths) - min(lengths) <= 1
    after, _ = shares(other, [300, 77], state)
    assert whole(after) == whole(shares(1, [*sizes, 300, 77], None)[0])[len(sizes) :]


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize(
    "hold",
    [
        lambda batch: batch,
        lambda batch: batch.rows,
        lambda batch: batch.rows.codes["mlp_in"],
        lambda batch: batch.rows.codes["mlp_out"][1][5:],
        lambda batch: torch.from_numpy(batch.rows.codes["mlp_in"][2]),
        lambda batch: batch.rows.codes["mlp_in"].reshape(-1).view(np.uint8),
        lambda batch: memoryview(batch.rows.codes["mlp_in"][0]),
        lambda batch: batch.rows.scales["mlp_out"][0],
        lambda batch: batch.values("mlp_in", 0, torch.device("cpu"), torch.bfloat16),
    ],
)
def test_what_is_held_of_a_batch_stays_as_it_was(
    planted: dict[str, Path], precision: str, hold: Callable[[Batch], Any]
) -> None:
    """Memory is used again, but never while any of it is held, in whatever form."""
    with Reader(Source([planted[precision]], "train"), buffer_tokens=256, seed=1) as reader:
        held = [hold(reader.next(100)) for _ in range(3)]
        before = copy.deepcopy([bytes(h) if isinstance(h, memoryview) else h for h in held])
        for _ in range(12):
            reader.next(100)
        for kept, copied in zip(held, before, strict=True):
            assert digest_of(kept) == digest_of(copied)


def digest_of(held: Any) -> bytes:
    """Of an array, a tensor, or whatever holds several."""
    if isinstance(held, dict):
        return b"".join(digest_of(held[name]) for name in sorted(held))
    if isinstance(held, tuple):
        return b"".join(map(digest_of, held))
    if isinstance(held, torch.Tensor):
        return digest_of(held.view(torch.int8).numpy())
    return hashlib.sha256(held.tobytes() if isinstance(held, np.ndarray) else bytes(held)).digest()


def test_memory_that_nobody_holds_is_used_again(planted: dict[str, Path]) -> None:
    """As many batches as are alive at a time, and none of another size."""
    with Reader(Source([planted["int8"]], "train"), buffer_tokens=256, seed=1) as reader:

        def place(n_tokens: int) -> int:
            return reader.next(n_tokens).rows.codes["mlp_in"].ctypes.data

        assert len({place(100) for _ in range(10)}) == 1
        held = [reader.next(100) for _ in range(2)]
        assert len(reader._batches._rooms) == 2
        del held
        assert len({place(70) for _ in range(10)}) == 1
        assert len(reader._batches._rooms) == 1


def test_a_rank_outside_the_world_is_refused(caches: Callable[[int, int], Path]) -> None:
    with pytest.raises(ValueError, match=r"rank: expected 0 to 1 \(world size 2\), found 2"):
        Reader(Source([caches(300, 128)], "train"), buffer_tokens=128, seed=0, rank=2, world_size=2)


def test_sequential_order_is_the_order_on_disk(caches: Callable[[int, int], Path]) -> None:
    source = Source([caches(300, 128)], "train")
    with Reader(source, buffer_tokens=128, seed=0, order="sequential") as reader:
        assert reader.next(450).token.tolist() == [*range(300), *range(150)]
    with pytest.raises(
        ValueError, match=r"order: expected one of .*'shuffled', 'sequential'.*, found 'random'"
    ):
        Reader(source, buffer_tokens=128, seed=0, order="random")


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 2800), batch=st.integers(1, 300), precision=st.sampled_from(["int8", "bf16"]))
def test_resuming_continues_the_stream(
    planted: dict[str, Path], before: int, batch: int, precision: str
) -> None:
    """A state taken anywhere, mid-buffer, mid-epoch, and written as JSON gives the same bytes afterwards."""
    source = Source([planted[precision]], "train")
    with Reader(source, buffer_tokens=128, seed=1) as reader:
        if before:
            reader.next(before)
        state = json.dumps(reader.state())
        expected = [digest(reader.next(batch)) for _ in range(3)]
    with Reader(source, buffer_tokens=128, seed=1) as again:
        again.next(7)
        again.restore(json.loads(state))
        assert [digest(again.next(batch)) for _ in range(3)] == expected


def test_a_state_has_one_size(caches: Callable[[int, int], Path]) -> None:
    """Three numbers and what they belong to, however large the cache and wherever in it."""
    sizes = set()
    for n_tokens in (300, 777):
        with Reader(Source([caches(n_tokens, 128)], "train"), buffer_tokens=64, seed=1) as reader:
            for _ in range(5):
                reader.next(130)
                state = reader.state()
                position = {state.pop(name) for name in ("epoch", "buffer", "offset")}
                assert all(type(number) is int for number in position)
                sizes.add(len(json.dumps(state)))
    assert len(sizes) == 1


def test_state_of_another_cache_seed_or_buffer_is_refused(
    caches: Callable[[int, int], Path], tmp_path: Path
) -> None:
    """The message says what differs and what to do."""
    both = write_cache(tmp_path / "c", 777, 128, val=300)
    here = Source([both], "train")
    with Reader(here, buffer_tokens=128, seed=1) as reader:
        state = reader.state()
    for source, buffer, seed, name, way_out in [
        (Source([caches(777, 128)], "train"), 128, 1, "fingerprint", "the same caches in the same order"),
        (here, 256, 1, "buffer_tokens", "the same --buffer-tokens"),
        (here, 128, 2, "seed", "the same --order-seed"),
        (Source([both], "val"), 128, 1, "split", "the same split"),
        (Source([both], "train", selection=Selection(exclude=("bos",))), 128, 1, "selection", "--exclude"),
    ]:
        with (
            Reader(source, buffer_tokens=buffer, seed=seed) as other,
            pytest.raises(ValueError, match=f"was reading another {name}: .*, now .*{way_out}"),
        ):
            other.restore(state)
    with (
        Reader(here, buffer_tokens=128, seed=1, order="sequential") as other,
        pytest.raises(ValueError, match="was reading another order"),
    ):
        other.restore(state)


@pytest.mark.parametrize(
    "place", [{"epoch": -1}, {"buffer": 7}, {"buffer": "1"}, {"offset": 129}, {"offset": 100}]
)
def test_a_state_that_stands_nowhere_is_refused(tmp_path: Path, place: dict[str, Any]) -> None:
    """Numbers that no reader writes, as in an altered checkpoint; never tokens that were not read."""
    selection = Selection(exclude=("image",))  # a third of each buffer
    source = Source([write_cache(tmp_path / "c", 777, 128)], "train", selection=selection)

    def go_on(reader: Reader) -> None:
        reader.restore(reader.state() | place)
        reader.next(1)

    ((name, found),) = place.items()
    with (
        Reader(source, buffer_tokens=128, seed=1) as reader,
        pytest.raises(ValueError, match=f"{name}: expected .*, found {found!r}"),
    ):
        go_on(reader)


def test_a_cache_that_is_named_twice_is_refused(caches: Callable[[int, int], Path]) -> None:
    path = caches(300, 128)
    with pytest.raises(CacheError, match=r"expected each cache once, found .*300-128 twice"):
        Source([path, path / ".." / path.name], "train")


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
