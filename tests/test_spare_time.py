"""Threads that give way to a model on the processor, and the writer that has its encoding done by them."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from clt.cache_format import CacheWriter, encoders
from clt.spare_time import use_spare_time

SET = "import os, clt.spare_time as s; print(s.leave_spare_time(), *(os.environ.get(n) for n in s.SETTINGS))"


@pytest.mark.parametrize(
    ("users", "found"),
    [
        ({}, "True None 30000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "False ACTIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "False None 7"),
    ],
)
def test_what_the_user_has_set_stays(users: dict[str, str], found: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if "OMP" not in name}
    done = subprocess.run(
        [sys.executable, "-c", SET], env=inherited | users, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux")
def test_only_the_thread_that_asks_gives_way() -> None:
    def policies() -> tuple[int, int]:
        return os.sched_getscheduler(threading.get_native_id()), os.sched_getscheduler(os.getpid())

    with ThreadPoolExecutor(1, initializer=use_spare_time) as pool:
        thread, process = pool.submit(policies).result()
    assert thread == os.SCHED_IDLE
    assert process != os.SCHED_IDLE


def test_a_sandbox_may_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbid, raising=False)
    use_spare_time()


def test_a_writer_without_spare_time_is_done_all_the_same(
    plan_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits does the work: here the threads get no time at all until the cache is complete."""
    expected, starved = plan_cache("whole"), plan_cache("starved")
    expected.write()
    complete, begun = threading.Event(), threading.Event()

    def starve() -> None:
        begun.set()
        complete.wait(60)

    monkeypatch.setattr(encoders, "use_spare_time", starve)
    with CacheWriter(starved.path, starved.manifest, spare=True) as writer:
        starved.feed(writer)
        writer.finish()
        assert begun.is_set()
        assert not complete.is_set()
        complete.set()
    assert starved.files() == expected.files()
