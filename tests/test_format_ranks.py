"""Several processes write one cache without talking to each other."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt.cache_format import CacheError, open_cache, verify_cache
from clt.cache_format.layout import SITES

SMALL: dict[str, Any] = {"layers": (1,), "window": 64, "d_model": 70, "world_size": 2, "threads": 1}


def start(work: Callable[[], None]) -> int:
    """Run `work` in a child process; its exit status is 0 where it returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: fork beside idle BLAS threads
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def write_slowly(tiny: Any, rank: int, pause: float) -> None:
    """Write one rank's part with a pause before every sample."""
    with tiny.writer(rank) as writer:
        add = writer.add

        def paused(*sample: Any) -> None:
            time.sleep(pause)
            add(*sample)

        writer.add = paused
        tiny.feed(writer, rank)
        writer.finish()


def statuses(*children: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def whole(make_cache: Callable[..., Any]) -> Any:
    """The cache that two ranks write one after the other."""
    return make_cache("whole", **SMALL)


def test_ranks_store_what_was_planned(whole: Any) -> None:
    """Together each token once, with its values; windows alternate; the logs hold every sample."""
    cache = open_cache(whole.path)
    assert cache.complete
    for name in ("train", "val"):
        split = cache[name]
        assert {entry.window % 2 for entry in split.entries} == {0, 1}
        columns = (split.token_column(column).tolist() for column in ("sample", "position"))
        found = list(zip(*columns, strict=True))
        assert len(found) == len(set(found))
        assert set(found) == whole.planned(name)
        for site in SITES:
            np.testing.assert_array_equal(split.read(site), whole.expected(split, site))
    assert sorted(cache.samples()) == [n for n in range(len(whole.samples)) if n != 3]
    assert [line["sample"] for line in cache.rejected()] == [3]
    assert verify_cache(str(whole.path), full=True) == []


@pytest.mark.parametrize("pauses", [(0.0, 0.0), (0.03, 0.0), (0.0, 0.03)], ids=["both", "0 slow", "1 slow"])
def test_it_does_not_matter_which_rank_is_slow(
    whole: Any, tmp_path: Any, pauses: tuple[float, float]
) -> None:
    """Two processes that begin in an empty folder at the same time leave the same files, byte for byte."""
    tiny = whole.at(tmp_path / "both")
    children = [start(partial(write_slowly, tiny, rank, pauses[rank])) for rank in (0, 1)]
    assert statuses(*children) == [0, 0]
    assert tiny.files() == whole.files()


@pytest.mark.slow
def test_ranks_that_race_again_and_again(whole: Any, tmp_path: Any) -> None:
    """Begun in the same moment in an empty folder, no rank trips over another's files."""
    expected = whole.files()
    for turn in range(50):
        tiny = whole.at(tmp_path / f"turn-{turn}")
        children = [start(partial(tiny.write, rank)) for rank in (0, 1)]
        assert statuses(*children) == [0, 0]
        assert tiny.files() == expected


def test_a_rank_that_begins_while_another_looks_is_no_stranger(
    whole: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a rank's two looks at the folder the other one may write its whole part."""
    tiny = whole.at(tmp_path / "both")
    tiny.path.mkdir()
    real, calls = Path.iterdir, []

    def iterdir(folder: Path) -> Any:
        if not calls:
            calls.append(folder)
            tiny.write(0)
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    tiny.write(1)
    assert calls == [tiny.path]
    assert tiny.files() == whole.files()


def write_half(tiny: Any, rank: int, done: int) -> None:
    """Commit a rank's first windows, say so through the pipe `done`, and hang."""
    with tiny.writer(rank) as writer:
        tiny.feed(writer, rank, stop=4)
        writer.flush()
        os.write(done, b"!")
        time.sleep(60)


def test_a_killed_rank_is_finished_alone(whole: Any, tmp_path: Any) -> None:
    """One rank's crash leaves the other's work alone, and running that rank again completes the cache."""
    tiny = whole.at(tmp_path / "both")
    heard, done = os.pipe()
    killed = start(lambda: write_half(tiny, 1, done))
    tiny.write(0)
    assert os.read(heard, 1) == b"!"
    os.kill(killed, signal.SIGKILL)
    assert statuses(killed) == [-signal.SIGKILL]
    os.close(heard)
    os.close(done)
    cache = open_cache(tiny.path)
    assert not cache.complete
    assert {entry.window % 2 for entry in cache["train"].entries} == {0, 1}
    tiny.write(1)
    assert tiny.files() == whole.files()


def test_the_same_rank_twice_is_refused(whole: Any, tmp_path: Any) -> None:
    """Two processes with one rank: the second one is told; the other rank may write."""
    tiny = whole.at(tmp_path / "both")
    with tiny.writer(1):
        with pytest.raises(CacheError, match="is being written by another process"):
            tiny.writer(1)
        tiny.write(0)
    tiny.write(1)
    assert tiny.files() == whole.files()


def test_a_rank_with_other_arguments_is_refused(whole: Any, plan_cache: Callable[..., Any]) -> None:
    """All ranks must agree on the manifest."""
    other = plan_cache("whole", **{**SMALL, "world_size": 3})
    with pytest.raises(CacheError, match="world_size: 2 -> 3"):
        other.writer(2)
