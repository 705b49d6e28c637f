"""Seconds to open, describe and verify a cache of very many small files.

    python benchmarks/bench_many_files.py [--shards 100000] [--folder DIR]

The cache is synthetic: one window of 32 layers is written, and copied under the names of all others, with a
journal to match. Times are those of a warm file system.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clt.cache_format import CacheWriter, Manifest, open_cache, verify_cache
from clt.cache_format.folder import Documents
from clt.cache_format.journal import WindowEntry, final_line, window_line
from clt.cache_format.layout import SITES, TOKEN_COLUMNS
from clt.cache_format.summary import render_summary, summarise_cache

LAYERS, WIDTH, WINDOW = 32, 8, 64
SHARDS_A_WINDOW = 4 * LAYERS
"""Codes and scales of both sites."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000, help="at least this many shard files")
    parser.add_argument("--folder", type=Path, help="where the cache is made [default: the system's]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "many"
        files = make_cache(path, -(-asked.shards // SHARDS_A_WINDOW))
        print(f"{files} files, of which {-(-asked.shards // SHARDS_A_WINDOW) * SHARDS_A_WINDOW} shards")
        seconds("open_cache", lambda: open_cache(path))
        seconds("info", lambda: render_summary(summarise_cache(open_cache(path)), str(path)))
        faults = seconds("verify", lambda: verify_cache(str(path)))
        faults += seconds("verify --full", lambda: verify_cache(str(path), full=True))
        if faults:
            raise SystemExit(f"expected no fault, found {faults[:3]}")


def make_cache(path: Path, windows: int) -> int:
    """A complete cache of so many windows; the number of their files."""
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="int8",
        step_divisor=8.0,
        window=WINDOW,
        seed=0,
        world_size=1,
        source={"model": "synthetic"},
    )
    columns = {name: np.zeros(WINDOW, dtype) for name, dtype in TOKEN_COLUMNS.items() if name != "sink"}
    rng = np.random.default_rng(0)
    values = {site: rng.standard_normal((WINDOW, LAYERS, WIDTH), np.float32) for site in SITES}
    with CacheWriter(path, manifest) as writer:
        writer.add("train", 0, {"sample": 0, "id": "0"}, columns, values)
    return add_windows(path, windows, lambda old, new: new.write_bytes(old.read_bytes()))


def add_windows(path: Path, windows: int, copy: Callable[[Path, Path], object]) -> int:
    """Give a cache this many windows, the new ones of the first one's files; the number of files."""
    cache = open_cache(path)
    first, *more = cache["train"].entries
    with open(path / "journal.jsonl", "ab") as journal:
        for window in range(1 + len(more), windows):
            names = {name: re.sub(r"/c\.0", f"/c.{window}", name) for name in first.files}
            for old, new in names.items():
                copy(path / old, path / new)
            files = {new: first.files[old] for old, new in names.items()}
            journal.write(window_line(WindowEntry(**{**vars(first), "window": window, "files": files})))
        journal.write(final_line(first.logs))
    Documents(path, cache.manifest, 0).refresh()
    return windows * len(first.files)


def seconds(name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = work()
    print(f"{name:<14} {time.perf_counter() - began:7.2f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
