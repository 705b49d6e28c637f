"""Golden caches of version 1: written once, committed, and readable for ever."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from clt.cache_format import open_cache, verify_cache
from clt.cache_format.layout import SITES, SPLITS, TOKEN_COLUMNS

GOLDEN = Path(__file__).parent / "golden"
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "bf16", "int8-32"])
IO = pytest.mark.parametrize("io", ["mmap", "pread"])


def expected(precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts, arrays) as they were committed beside the cache."""
    with np.load(GOLDEN / f"{precision}.npz", allow_pickle=False) as arrays:
        return json.loads((GOLDEN / f"{precision}.json").read_text()), dict(arrays)


@IO
@PRECISIONS
def test_a_golden_cache_has_its_values(precision: str, io: str) -> None:
    """Every value and every column of the token table, bit for bit."""
    _, arrays = expected(precision)
    cache = open_cache(GOLDEN / precision, io=io)
    for name in SPLITS:
        for site in SITES:
            found = cache[name].read(site)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(
                found.view(np.uint32), arrays[f"{name}/{site}"].view(np.uint32), f"{name} {site}"
            )
        for column, dtype in TOKEN_COLUMNS.items():
            found = cache[name].token_column(column)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, arrays[f"{name}/token/{column}"], f"{name} {column}")


@PRECISIONS
def test_a_golden_cache_has_its_facts(precision: str) -> None:
    """Manifest, windows, counts, samples and what was rejected."""
    facts, _ = expected(precision)
    cache = open_cache(GOLDEN / precision)
    assert cache.manifest.to_json() == facts["manifest"]
    assert cache.complete == facts["complete"]
    assert list(cache.samples().values()) == facts["samples"]
    assert cache.rejected() == facts["rejected"]
    for name in SPLITS:
        split = cache[name]
        assert len(split) == facts["tokens"][name]
        assert [[entry.window, entry.tokens] for entry in split.entries] == facts["windows"][name]
        assert split.counts() == facts["kinds"][name]
        assert split.n_sinks == facts["sinks"][name]


@PRECISIONS
def test_a_golden_cache_has_its_statistics(precision: str) -> None:
    """The moments that were committed, which are those of the values that were committed."""
    _, arrays = expected(precision)
    cache = open_cache(GOLDEN / precision)
    for name in SPLITS:
        for site in SITES:
            with np.errstate(invalid="ignore"):
                values = arrays[f"{name}/{site}"].astype(np.float64)
                variance = ((values - values.mean(axis=0)) ** 2).mean(axis=0).sum(axis=-1)
            found = cache[name].statistics(site)
            for statistic in ("mean", "variance", "rms", "absmax", "noise_fvu"):
                np.testing.assert_allclose(
                    getattr(found, statistic), arrays[f"{name}/{site}/{statistic}"], rtol=1e-12
                )
            np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.variance, variance, rtol=1e-4)


@PRECISIONS
def test_a_golden_cache_is_whole(precision: str) -> None:
    """`clt verify --full` finds nothing, and every file in the folder belongs there."""
    path = GOLDEN / precision
    assert verify_cache(str(path), full=True) == []
    listed = {file for journal in open_cache(path).journals for e in journal.windows for file in e.files}
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert {name.rpartition("/")[2].partition("-")[0].partition(".")[0] for name in there - listed} == {
        "zarr",
        "journal",
        "samples",
        "rejected",
    }


@PRECISIONS
def test_a_golden_cache_opens_without_our_code(precision: str) -> None:
    """zarr-python reads the same stored numbers, where the windows' tokens lie."""
    facts, arrays = expected(precision)
    group = zarr.open_group(GOLDEN / precision, mode="r")
    window = facts["manifest"]["window"]
    for name in SPLITS:
        rows = np.concatenate([window * w + np.arange(tokens) for w, tokens in facts["windows"][name]])
        for site in SITES:
            stored = group[f"{name}/{site}"][...][rows]
            if precision != "bf16":
                scale = group[f"{name}/{site}_scale"][...][rows].astype(np.float32)
                values = stored * np.repeat(scale, facts["manifest"]["block"], axis=2)[..., : stored.shape[2]]
            else:
                values = (stored.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(
                values.view(np.uint32), arrays[f"{name}/{site}"].view(np.uint32), f"{name} {site}"
            )


def test_the_golden_caches_cover_what_they_are_for() -> None:
    """Both precisions, both blocks, both splits, partial last windows, a sink, several writers, what is not
    finite."""
    for precision, writers, block in (("int8", 1, 64), ("bf16", 2, 64), ("int8-32", 1, 32)):
        facts, arrays = expected(precision)
        assert facts["manifest"]["precision"] == precision.partition("-")[0]
        assert facts["manifest"]["block"] == block
        assert facts["manifest"]["world_size"] == writers
        for name in SPLITS:
            assert 0 < facts["windows"][name][-1][1] < facts["manifest"]["window"]
            assert facts["sinks"][name]
        assert np.isnan(arrays["val/mlp_in"]).any() == (precision == "bf16")
        assert sum(f.stat().st_size for f in (GOLDEN / precision).rglob("c.*")) < 32_000
    assert len(expected("int8")[0]["windows"]["train"]) > 1
