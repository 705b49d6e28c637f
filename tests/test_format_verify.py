"""verify_cache: whatever was altered in whatever file is found, and its file is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt.cache_format import open_cache, verify_cache

SMALL: dict[str, Any] = {"lengths": (40, 30, 12, 9, 20), "layers": (0, 4), "window": 64, "d_model": 70}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def flips_that_are_not_found(root: Path, flips: int) -> list[str]:
    """Flip bits spread over every file, one at a time, and verify after each."""
    rng = np.random.default_rng(0)
    missed = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        size = 8 * path.stat().st_size
        for bit in {0, size - 1, *rng.integers(0, max(size, 1), flips).tolist()} if size else ():
            flip(path, bit)
            faults = verify_cache(str(root), full=True)
            if not any(str(path.relative_to(root)) in fault for fault in faults):
                missed.append(f"{path.relative_to(root)} bit {bit}: {faults}")
            flip(path, bit)
    return missed


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_whole_cache_has_no_fault(make_cache: Callable[..., Any], precision: str) -> None:
    """Quick and full, the latter telling its progress file by file."""
    tiny = make_cache(precision=precision)
    assert verify_cache(str(tiny.path)) == []
    told: list[int] = []
    assert verify_cache(str(tiny.path), full=True, progress=told.append) == []
    assert sum(told) == open_cache(tiny.path).n_files > 0


def test_one_flipped_bit_in_any_file_is_found(make_cache: Callable[..., Any]) -> None:
    """Shards, statistics, every zarr.json, samples, rejected and journal: the file is named."""
    tiny = make_cache(precision="bf16", **SMALL)
    assert {"journal.jsonl", "samples.jsonl", "rejected.jsonl", "zarr.json"} <= tiny.files().keys()
    assert flips_that_are_not_found(tiny.path, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_many_flipped_bits_in_any_file_are_found(
    make_cache: Callable[..., Any], precision: str, world_size: int
) -> None:
    """The same for 40 bits of every file."""
    tiny = make_cache(precision=precision, world_size=world_size, **SMALL)
    assert flips_that_are_not_found(tiny.path, 40) == []


def test_every_missing_file_is_found(make_cache: Callable[..., Any]) -> None:
    """Whichever file is taken away, quick and full verification name it."""
    tiny = make_cache(**SMALL | {"lengths": (40, 30, 12)})  # nothing is rejected, the log of that is empty
    for name, data in tiny.files().items():
        path = tiny.path / name
        path.unlink()
        for full in (False, True):
            assert any(name in fault for fault in verify_cache(str(tiny.path), full=full)), name
        path.write_bytes(data)


def test_every_cut_file_is_found_without_reading_it(make_cache: Callable[..., Any]) -> None:
    """A file that lost its last byte is named by the quick verification."""
    tiny = make_cache(**SMALL)
    for name, data in tiny.files().items():
        os.truncate(tiny.path / name, len(data) - 1)
        assert any(name in fault for fault in verify_cache(str(tiny.path))), name
        (tiny.path / name).write_bytes(data)


def test_all_faults_are_listed(make_cache: Callable[..., Any]) -> None:
    """One fault does not hide the others, whatever kinds of file they are in."""
    tiny = make_cache(**SMALL)
    altered = ["train/mlp_in/c.0.0.0", "val/token/kind/c.0", "stats/train/count/c.1.0", "samples.jsonl"]
    for name in altered:
        flip(tiny.path / name, 77)
    gone = ["train/mlp_out_scale/c.0.1.0", "train/zarr.json", "val/mlp_in/zarr.json"]
    for name in gone:
        (tiny.path / name).unlink()
    faults = verify_cache(str(tiny.path), full=True)
    assert len(faults) == len(altered) + len(gone)
    for name in altered + gone:
        assert sum(name in fault for fault in faults) == 1
    assert all("\n" not in fault for fault in faults)


def test_a_cut_off_harvest_is_no_damage(plan_cache: Callable[..., Any]) -> None:
    """What was committed verifies while the rest is still to come."""
    tiny = plan_cache()
    with tiny.writer() as writer:
        tiny.feed(writer)
    assert verify_cache(str(tiny.path), full=True) == []


def test_what_is_no_cache_is_one_fault(tmp_path: Path) -> None:
    """A folder without a manifest is told, not raised."""
    (fault,) = verify_cache(str(tmp_path), full=True)
    assert "is no cache" in fault
