"""Windows are committed in order, each synced while the next is encoded, and none behind one that failed."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clt.cache_format.commits import Commits
from clt.cache_format.encoders import Written
from clt.cache_format.files import FileBeside
from clt.stopwatch import Stopwatch

WAIT = 20.0
"""Seconds after which a thread is taken to wait for ever."""


@pytest.fixture
def commits() -> Iterator[Commits]:
    made = Commits(Stopwatch())
    yield made
    made.shutdown()


def nothing() -> Written:
    return {}


def waits_for(event: threading.Event) -> Callable[[Written], None]:
    def commit(written: Written) -> None:
        assert event.wait(WAIT)

    return commit


def test_one_is_encoded_while_the_one_before_is_synced(commits: Commits) -> None:
    """Neither waits for the other."""
    encoded = threading.Event()

    def encode() -> Written:
        encoded.set()
        return {}

    commits.put(nothing, waits_for(encoded))
    commits.put(encode, lambda written: None)
    commits.wait()


def test_no_more_than_one_waits_to_be_committed(commits: Commits) -> None:
    """A third window is not taken before the first one is safe: the disk sets the pace where it is slow."""
    synced, taken = threading.Event(), threading.Event()
    commits.put(nothing, waits_for(synced))
    commits.put(nothing, lambda written: None)

    def third() -> None:
        commits.put(nothing, lambda written: None)
        taken.set()

    thread = threading.Thread(target=third)
    thread.start()
    time.sleep(0.05)
    assert not taken.is_set()
    synced.set()
    thread.join(WAIT)
    assert taken.is_set()


def test_commits_keep_their_order(commits: Commits) -> None:
    done: list[int] = []

    def commit(number: int) -> Callable[[Written], None]:
        def work(written: Written) -> None:
            time.sleep(0.002 * (number % 3))
            done.append(number)

        return work

    for number in range(12):
        commits.put(nothing, commit(number))
    commits.wait()
    assert done == list(range(12))


@pytest.mark.parametrize("failing", ["encode", "commit"])
def test_behind_a_failure_nothing_is_committed(commits: Commits, tmp_path: Path, failing: str) -> None:
    """What was encoded meanwhile is removed, and the first fault is what is told."""
    encoded, fault = threading.Event(), OSError("the disk is gone")

    def fail(*_: object) -> Written:
        assert failing == "encode" or encoded.wait(WAIT)
        raise fault

    def encode() -> Written:
        written = {"file": FileBeside(tmp_path / "file", [b"bytes"])}
        encoded.set()
        return written

    def commit(written: Written) -> None:
        raise AssertionError("there is a gap before it")

    if failing == "encode":
        commits.put(fail, commit)
    else:
        commits.put(nothing, fail)

    def go_on() -> None:
        commits.put(encode, commit)
        commits.wait()

    with pytest.raises(OSError, match="the disk is gone"):
        go_on()
    commits.shutdown()
    assert list(tmp_path.iterdir()) == []
