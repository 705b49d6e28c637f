"""What goes to the writer keeps its order, and stops at the first fault."""

import threading
from functools import partial

import pytest

from clt.harvest.outbox import Outbox


def fail() -> None:
    raise ValueError("the disk is gone")


def test_jobs_run_in_order() -> None:
    done: list[int] = []
    with Outbox() as outbox:
        for number in range(40):
            put = outbox.put_note if number % 3 else outbox.put_batch
            put(partial(done.append, number))
        outbox.drain()
    assert done == list(range(40))


def test_at_once_means_in_the_callers_thread_and_faults_are_its_own() -> None:
    done: list[object] = []
    with Outbox(beside=False) as outbox:
        outbox.put_batch(lambda: done.append(threading.current_thread()))
        outbox.put_note(lambda: done.append(threading.current_thread()))
        assert done == [threading.current_thread()] * 2
        with pytest.raises(ValueError, match="the disk is gone"):
            outbox.put_batch(fail)
        with pytest.raises(ValueError, match="the disk is gone"):  # behind it too
            outbox.put_note(partial(done.append, 1))
        outbox.drain()
    assert len(done) == 2


def test_nothing_is_stored_behind_a_fault() -> None:
    """What waits behind a batch that could not be stored must not be: the cache would have a gap."""
    done: list[int] = []
    may_fail = threading.Event()

    def fail_later() -> None:
        may_fail.wait()
        fail()

    with Outbox() as outbox:
        outbox.put_batch(fail_later)
        outbox.put_batch(partial(done.append, 1))
        outbox.put_note(partial(done.append, 2))
        may_fail.set()
        with pytest.raises(ValueError, match="the disk is gone"):
            outbox.drain()
    assert done == []


def test_a_fault_in_a_note_is_raised_too() -> None:
    with Outbox() as outbox:
        outbox.put_note(fail)
        with pytest.raises(ValueError, match="the disk is gone"):
            outbox.drain()


def test_whoever_brings_the_next_hears_of_the_fault() -> None:
    def bring_ten(outbox: Outbox) -> None:
        for _ in range(10):
            outbox.put_batch(fail)

    with Outbox() as outbox, pytest.raises(ValueError, match="the disk is gone"):
        bring_ten(outbox)
