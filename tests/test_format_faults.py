"""A full disk, a failing disk, a kill, at any moment: what is committed is there, and finishing is exact.

Every operation that changes the disk is counted; a run fails, or is killed, at the n-th. With one thread, and
windows that wait for each other, the count is the same in every run, so n runs over every moment that there
is; where they go on beside each other, moments are tried that may be another's the next time.
"""

import builtins
import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt.cache_format import CacheError, open_cache, verify_cache
from clt.cache_format.commits import Commits
from clt.cache_format.layout import SITES

FILLS = {"open", "write", "mkdir"}
"""Operations that need room on the disk."""
OPTIONS: dict[str, Any] = {
    "lengths": (30, 40, 20, 5, 33),
    "layers": (4,),
    "window": 64,
    "d_model": 8,
    "threads": 1,
}
QUICK = 61
"""The quick tests try every QUICK-th operation."""


class Disk:
    """Counts what changes the disk; at operation `at` it lets `fail` act, after half of a write was done."""

    def __init__(self, at: int = -1, fail: Callable[[str], None] = lambda kind: None, goes_on: bool = False):
        self.at, self.fail, self.goes_on = at, fail, goes_on
        self.trace: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.names: dict[int, str] = {}
        self.real = {
            name: getattr(os, name)
            for name in ("open", "dup", "write", "fsync", "replace", "mkdir", "ftruncate")
        }
        self.real_open = builtins.open

    def step(self, kind: str, path: object, half: Callable[[], object] = lambda: None) -> None:
        with self.lock:
            number = len(self.trace)
            self.trace.append((kind, str(path)))
        if number == self.at or (self.goes_on and number > self.at >= 0 and kind in FILLS):
            half()
            self.fail(kind)

    def open(self, path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            self.step("open", path)
        descriptor: int = self.real["open"](path, flags, *rest, **named)
        self.names[descriptor] = str(path)
        return descriptor

    def dup(self, descriptor: int) -> int:
        twin: int = self.real["dup"](descriptor)
        self.names[twin] = self.names.get(descriptor, "")
        return twin

    def write(self, descriptor: int, data: bytes) -> int:
        half = data[: len(data) // 2]
        self.step("write", self.names.get(descriptor), lambda: self.real["write"](descriptor, half))
        written: int = self.real["write"](descriptor, data)
        return written

    def fsync(self, descriptor: int) -> None:
        self.step("fsync", self.names.get(descriptor))
        self.real["fsync"](descriptor)

    def ftruncate(self, descriptor: int, size: int) -> None:
        self.step("ftruncate", self.names.get(descriptor))
        self.real["ftruncate"](descriptor, size)

    def replace(self, source: Any, target: Any, **named: Any) -> None:
        self.step("replace", target)
        self.real["replace"](source, target, **named)

    def mkdir(self, path: Any, *rest: Any, **named: Any) -> None:
        self.step("mkdir", path)
        self.real["mkdir"](path, *rest, **named)

    def builtin_open(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return self.real_open(path, mode, *rest, **named)
        self.step("open", path)
        file = self.real_open(path, mode, *rest, **named)
        self.names[file.fileno()] = str(path)
        return WatchedFile(file, self, str(path))

    @contextlib.contextmanager
    def watched(self, in_turn: bool = True) -> Iterator["Disk"]:
        """in_turn: a window is encoded once the one before is committed."""
        put = Commits.put

        def put_and_wait(commits: Commits, *work: Any) -> None:
            put(commits, *work)
            commits.wait()

        with pytest.MonkeyPatch.context() as patch:
            if in_turn:
                patch.setattr(Commits, "put", put_and_wait)
            for name in self.real:
                patch.setattr(os, name, getattr(self, name))
            patch.setattr(builtins, "open", self.builtin_open)
            yield self


class WatchedFile:
    """A file that is open for writing, whose changes the disk counts."""

    def __init__(self, file: Any, disk: Disk, path: str) -> None:
        self._file, self._disk, self._path = file, disk, path

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *fault: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.step("write", self._path, half)
        written: int = self._file.write(data)
        return written

    def truncate(self, size: int) -> None:
        self._disk.step("truncate", self._path)
        self._file.truncate(size)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a folder: a busy disk makes minutes of 200,000 small files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="clt-faults-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is counted, and its order checked, but not waited for: no kill of a process could show it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def whole(plan_cache: Callable[..., Any]) -> Any:
    """The cache of an uninterrupted run, with its trace of operations."""
    tiny = plan_cache("whole", **OPTIONS)
    with Disk().watched() as disk:
        tiny.write()
    tiny.trace = disk.trace
    tiny.bytes = tiny.files()
    return tiny


def window_lines(trace: list[tuple[str, str]], kind: str, end: int) -> int:
    """Windows whose line saw operation `kind` before operation number `end`; the first line is the header."""
    lines = [n for n, (k, path) in enumerate(trace) if k == kind and path.endswith("journal.jsonl")]
    return max(0, sum(n < end for n in lines) - 1)


def check_committed(tiny: Any, whole: Any, expected: int) -> None:
    """open_cache shows exactly the first `expected` windows, with their true numbers."""
    try:
        cache = open_cache(tiny.path)
    except CacheError:
        assert expected == 0
        assert not (tiny.path / "zarr.json").exists()
        return
    entries = [entry for journal in cache.journals for entry in journal.windows]
    (journal,) = open_cache(whole.path).journals
    assert entries == journal.windows[:expected]
    for name in ("train", "val"):
        split = cache[name]
        for site in SITES:
            np.testing.assert_array_equal(split.read(site), tiny.expected(split, site))
    assert len(cache.samples()) <= len(tiny.samples)


def check_finishing(tiny: Any, whole: Any) -> None:
    """Another run gives every file as the uninterrupted one has it, and no other file."""
    tiny.write()
    found = tiny.files()
    assert found.keys() == whole.bytes.keys()
    assert [name for name in found if found[name] != whole.bytes[name]] == []


def moments(trace: list[tuple[str, str]], start: int = 0) -> list[int]:
    """Every QUICK-th operation, and the last of each kind."""
    last = {kind: n for n, (kind, _) in enumerate(trace)}
    return sorted({*range(start, len(trace), QUICK), *last.values()})


def fail_at(tiny: Any, whole: Any, at: int, code: int, goes_on: bool) -> None:
    def fail(kind: str) -> None:
        raise OSError(code, os.strerror(code))

    shutil.rmtree(tiny.path, ignore_errors=True)
    with Disk(at, fail, goes_on).watched(), pytest.raises(OSError, match=os.strerror(code)):
        tiny.write()
    # the last line says that the cache is complete, so it is no window
    committed = min(window_lines(whole.trace, "fsync", at), N_WINDOWS)
    check_committed(tiny, whole, committed)
    check_finishing(tiny, whole)


def killed_run(tiny: Any, at: int) -> int:
    """Write in a child process that kills itself at operation `at`; its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: fork beside idle BLAS threads
        child = os.fork()
    if child == 0:
        kill = Disk(at, lambda kind: os.kill(os.getpid(), signal.SIGKILL))
        with contextlib.suppress(BaseException), kill.watched(tiny.threads == 1):
            tiny.write()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_at(tiny: Any, whole: Any, at: int) -> None:
    shutil.rmtree(tiny.path, ignore_errors=True)
    status = killed_run(tiny, at)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    check_committed(tiny, whole, min(window_lines(whole.trace, "write", at), N_WINDOWS))
    check_finishing(tiny, whole)


N_WINDOWS = 3
"""Two of train and one of val."""
FAULTS = pytest.mark.parametrize(
    ("code", "goes_on"), [(errno.EIO, False), (errno.ENOSPC, True)], ids=["EIO once", "ENOSPC from there on"]
)


def test_the_run_has_every_kind_of_operation(whole: Any) -> None:
    """What is tried below is what a harvest does: several windows, all kinds of operation."""
    assert {kind for kind, _ in whole.trace} == {
        "open",
        "write",
        "fsync",
        "replace",
        "mkdir",
        "truncate",
        "ftruncate",
    }
    (journal,) = open_cache(whole.path).journals
    assert len(journal.windows) == N_WINDOWS
    assert journal.complete
    assert verify_cache(str(whole.path), full=True) == []


def test_the_operations_are_the_same_in_every_run(whole: Any, tmp_path: Path) -> None:
    """With one thread the n-th operation is always the same one."""
    tiny = whole.at(tmp_path / "again")
    with Disk().watched() as disk:
        tiny.write()
    there = [(kind, path.replace("/again", "/whole")) for kind, path in disk.trace]
    assert there == whole.trace


@FAULTS
def test_a_failing_disk_loses_no_committed_window(
    whole: Any, tmp_path: Path, code: int, goes_on: bool
) -> None:
    """Sampled over all operations."""
    tiny = whole.at(tmp_path / "faulty")
    for at in moments(whole.trace):
        fail_at(tiny, whole, at, code, goes_on)


def test_a_kill_loses_no_committed_window(whole: Any, tmp_path: Path) -> None:
    """Sampled over all operations; the process is killed for real."""
    tiny = whole.at(tmp_path / "killed")
    for at in moments(whole.trace, 7):
        kill_at(tiny, whole, at)


@FAULTS
def test_a_failure_around_the_commit_is_exact(whole: Any, tmp_path: Path, code: int, goes_on: bool) -> None:
    """Every operation on the journal, and the one before and after."""
    tiny = whole.at(tmp_path / "faulty")
    at_journal = [n for n, (_, path) in enumerate(whole.trace) if path.endswith("journal.jsonl")]
    for at in sorted({n + d for n in at_journal for d in (-1, 0, 1)} & set(range(len(whole.trace))))[::3]:
        fail_at(tiny, whole, at, code, goes_on)


@pytest.mark.slow
@FAULTS
def test_every_single_failure(whole: Any, tmp_path: Path, code: int, goes_on: bool) -> None:
    """Each operation in turn."""
    tiny = whole.at(tmp_path / "faulty")
    for at in range(len(whole.trace)):
        fail_at(tiny, whole, at, code, goes_on)


@pytest.mark.slow
def test_every_single_kill(whole: Any, tmp_path: Path) -> None:
    """Each operation in turn."""
    tiny = whole.at(tmp_path / "killed")
    for at in range(len(whole.trace)):
        kill_at(tiny, whole, at)


@pytest.mark.slow
def test_kills_upon_kills(whole: Any, tmp_path: Path) -> None:
    """A run that is killed again and again, a little later each time, still ends in the same bytes."""
    tiny = whole.at(tmp_path / "killed")
    for at in range(0, 400, 23):
        killed_run(tiny, at)
    check_finishing(tiny, whole)


def test_kills_while_many_threads_write(whole: Any, tmp_path: Path) -> None:
    """Whatever order the threads' operations come in: a prefix of the windows stays, finishing is exact."""
    tiny = whole.at(tmp_path / "killed")
    tiny.threads = 4
    for at in moments(whole.trace, 11):
        shutil.rmtree(tiny.path, ignore_errors=True)
        assert os.WIFSIGNALED(killed_run(tiny, at))
        windows = open_cache(tiny.path).windows if (tiny.path / "zarr.json").exists() else []
        check_committed(tiny, whole, len(windows))
        check_finishing(tiny, whole)


@FAULTS
def test_a_failing_disk_while_many_threads_write(
    whole: Any, tmp_path: Path, code: int, goes_on: bool
) -> None:
    """The same, of faults: a window that was encoded beside the one that failed is not committed either."""
    tiny = whole.at(tmp_path / "faulty")
    tiny.threads = 4

    def fail(kind: str) -> None:
        raise OSError(code, os.strerror(code))

    for at in moments(whole.trace, 5):
        shutil.rmtree(tiny.path, ignore_errors=True)
        with Disk(at, fail, goes_on).watched(in_turn=False), pytest.raises(OSError, match=os.strerror(code)):
            tiny.write()
        assert not list(tiny.path.rglob("*.partial"))
        windows = open_cache(tiny.path).windows if (tiny.path / "zarr.json").exists() else []
        check_committed(tiny, whole, len(windows))
        check_finishing(tiny, whole)


def test_the_line_is_written_after_all_that_it_names_is_durable(whole: Any) -> None:
    """Each file is synced before its rename, and its folder and the logs before the journal's line: the order
    that a loss of power needs, which a kill does not show."""
    synced: set[str] = set()
    renamed: set[str] = set()
    lines = iter(open_cache(whole.path).journals[0].windows)
    header = True
    for kind, path in whole.trace:
        name = Path(path).name
        if kind == "fsync":
            synced.add(path)
            renamed -= {file for file in renamed if str(Path(file).parent) == path}
        elif kind == "replace":
            partial = str(Path(path).with_name(f".{name}.0.partial"))
            assert partial in synced
            synced.discard(partial)
            renamed.add(path)
        elif kind == "write" and name.endswith(".jsonl"):
            synced.discard(path)
            if name == "journal.jsonl" and not header:
                entry = next(lines, None)
                named = {str(whole.path / file) for file in entry.files} if entry else set()
                assert not named & renamed
                assert {str(whole.path / "samples.jsonl"), str(whole.path / "rejected.jsonl")} <= synced
            header &= name != "journal.jsonl"


def test_a_writer_that_failed_writes_no_more(plan_cache: Callable[..., Any]) -> None:
    """After a failed window nothing can be committed behind the gap: it must be opened again."""
    tiny = plan_cache(**OPTIONS)

    def fail(kind: str) -> None:
        raise OSError(errno.EIO, "disk")

    with Disk(10**9).watched(in_turn=False) as disk:
        writer = tiny.writer()
        disk.at, disk.fail = len(disk.trace) + 5, fail
        tiny.feed(writer, stop=2)  # fills one window, which fails behind our back
        with pytest.raises(OSError, match="disk"):
            writer.flush()
    sample = tiny.samples[-1]
    for use in (
        lambda: writer.add(sample.split, 9, sample.line, sample.columns, sample.values),
        writer.flush,
        writer.finish,
    ):
        with pytest.raises(CacheError, match="Run the harvest again"):
            use()
    writer.close()
    assert len(open_cache(tiny.path)["train"]) == 0


@pytest.mark.parametrize("kind", ["write", "fsync", "replace"])
def test_a_failed_window_leaves_nothing_beside(plan_cache: Callable[..., Any], kind: str) -> None:
    """Whatever other threads had written beside their places meanwhile: a full disk needs the room."""
    tiny = plan_cache(**{**OPTIONS, "threads": 4, "layers": tuple(range(8))})
    before = len(os.listdir("/dev/fd"))
    failing = [0]

    def fail(found: str) -> None:
        raise OSError(errno.ENOSPC, "full")

    class Full(Disk):
        def step(self, found: str, path: object, half: Callable[[], object] = lambda: None) -> None:
            shard = found == kind and "/train/mlp_" in str(path) and "c.0." in Path(str(path)).name
            failing[0] += shard
            if shard and failing[0] > 20:
                fail(found)

    with Full().watched(in_turn=False):
        writer = tiny.writer()
        tiny.feed(writer, stop=2)  # fills one window
        with pytest.raises(OSError, match="full"):
            writer.flush()
        writer.close()
    assert failing[0] > 20
    assert not list(tiny.path.rglob("*.partial"))
    assert len(os.listdir("/dev/fd")) == before
