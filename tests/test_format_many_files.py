"""Caches of very many files: nothing is looked at twice, and everybody is told how far it is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clt.cache_format import open_cache, verify_cache

ROOT = Path(__file__).parents[1]


def run_bench(shards: int) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_many_files.py"), "--shards", str(shards)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("shards", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_cache_of_many_files_opens_and_verifies(shards: int) -> None:
    """The benchmark's cache is sound: open, info, and both verifications find all files and no fault."""
    head, *lines = run_bench(shards)
    assert int(head.split()[-2]) >= shards
    assert [line.rpartition(" s")[0].split()[0] for line in lines] == [
        "open_cache",
        "info",
        "verify",
        "verify",
    ]


def test_each_file_is_looked_at_once(make_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To open is one stat a file; to verify one stat, and one open and one read of each shard."""
    tiny = make_cache()
    cache = open_cache(tiny.path, check=False)
    calls: dict[str, list[str]] = {"stat": [], "open": []}
    for name in calls:
        real = getattr(os, name)

        def counted(path: Any, *rest: Any, name: str = name, real: Any = real, **named: Any) -> Any:
            if "/c." in str(path):
                calls[name].append(str(path))
            return real(path, *rest, **named)

        monkeypatch.setattr(os, name, counted)
    told: list[int] = []
    cache.check_files(told.append)
    assert sum(told) == cache.n_files == len(calls["stat"]) == len(set(calls["stat"]))
    assert calls["open"] == []
    calls["stat"].clear()
    told.clear()
    assert verify_cache(cache, progress=told.append) == []
    assert sum(told) == cache.n_files == len(calls["stat"]) == len(set(calls["stat"]))
    shards = [name for name in calls["stat"] if "/stats/" not in name and "/token/" not in name]
    assert sorted(calls["open"]) == sorted(shards)
