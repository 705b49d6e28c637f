"""A damaged chunk: one error that names it, never a wrong number, never a hang. In real processes."""

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from planted import write_planted

from clt.cache_format import DamagedCacheError
from clt.cache_format.open_shards import Fetched
from clt.train.reader import Reader
from clt.train.source import Source
from clt.train.stored_rows import Rows

IO = pytest.mark.parametrize("io", ["mmap", "pread"])

READ_AN_EPOCH = """
import sys
from pathlib import Path
from clt.train.reader import Reader
from clt.train.source import Source
source = Source([Path(sys.argv[1])], "train", io=sys.argv[2])
with Reader(source, buffer_tokens=256, seed=0, threads=3) as reader:
    for _ in range(13):
        reader.next(100)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1300, val=100)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """One bit flipped in the middle of the second window of layer 2's mlp_out."""
    cache = tmp_path / "c"
    shutil.copytree(whole, cache)
    flip(cache / "train/mlp_out/c.1.2.0")
    return cache


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def names_the_place(message: str, cache: Path, file: str = "train/mlp_out/c.1.2.0") -> bool:
    return all(part in message for part in (str(cache / file), "window 1", "layer 2", "site mlp_out"))


@IO
def test_a_process_that_reads_a_damaged_cache_ends_with_its_place(damaged: Path, io: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_AN_EPOCH, str(damaged), io], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "DamagedCacheError" in last
    assert names_the_place(last, damaged)


@IO
def test_a_damaged_scale_and_a_damaged_index_are_named(whole: Path, tmp_path: Path, io: str) -> None:
    for number, file in enumerate(["train/mlp_out_scale/c.1.2.0", "train/mlp_out/c.1.2.0"]):
        cache = tmp_path / str(number)
        shutil.copytree(whole, cache)
        flip(cache / file) if number == 0 else flip_index(cache / file)
        with (
            Reader(Source([cache], "train", io=io), buffer_tokens=2048, seed=0) as reader,
            pytest.raises(DamagedCacheError) as caught,
        ):
            reader.next(1)
        assert names_the_place(str(caught.value), cache, file)


def flip_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_what_lies_before_the_damage_is_read_and_the_damage_stays_an_error(damaged: Path) -> None:
    """`next` fails each time it comes to the chunk, and `restore` to a place before it reads on."""
    good = Source([damaged], "train", layers=(0, 1))
    with Reader(good, buffer_tokens=128, seed=0) as reader:
        expected = [reader.next(64) for _ in range(20)]
    with Reader(Source([damaged], "train"), buffer_tokens=128, seed=0) as reader:
        start, read = reader.state(), []
        with pytest.raises(DamagedCacheError):
            read.extend(iter(lambda: reader.next(64).token.tolist(), None))
        with pytest.raises(DamagedCacheError):
            reader.next(64)
        assert read == [batch.token.tolist() for batch in expected[: len(read)]] != []
        reader.restore(start)
        for batch in expected[: len(read)]:
            again = reader.next(64)
            np.testing.assert_array_equal(again.rows.codes["mlp_in"][:2], batch.rows.codes["mlp_in"])


def test_a_failed_fill_leaves_no_task_behind(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that decodes on while another fails would write into a buffer that is filled anew."""
    source, running = Source([whole], "train"), []

    def decode(self: Fetched, *_: object) -> int:
        if self.where[1] == "layer 1, site mlp_in":
            raise DamagedCacheError("broken")
        running.append(self)
        time.sleep(0.2)
        running.pop()
        return 0

    monkeypatch.setattr(Fetched, "decode", decode)
    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(DamagedCacheError, match="broken"):
            source.fill(source.allocate(2), np.arange(2), pool)
        assert not running


def test_leaving_does_not_wait_for_what_is_queued(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a buffer half decoded, at most the tasks that run are waited for; the rest never starts."""
    source, started, all_queued = Source([whole], "train"), [], threading.Event()
    first = Source.fill

    def fill(self: Source, rows: Rows, chunks: np.ndarray, pool: ThreadPoolExecutor) -> None:
        first(self, rows, chunks, pool)

        def task(number: int) -> None:
            started.append(number)
            time.sleep(0.1)

        queued = [pool.submit(task, number) for number in range(1000)]
        all_queued.set()
        for waiting in queued:
            waiting.result()

    with Reader(source, buffer_tokens=256, seed=0, threads=2) as reader:
        reader.next(10)
        reader._ahead.result()  # the next fill is the one that follows, and no fill has begun it
        monkeypatch.setattr(Source, "fill", fill)
        reader.next(300)
        ahead = reader._ahead
        assert all_queued.wait(10)
        before = len(started)
    assert len(started) < before + 20
    assert ahead is not None
    with pytest.raises(CancelledError):
        ahead.result(timeout=0)
