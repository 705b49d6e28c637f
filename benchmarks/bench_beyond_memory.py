"""Speed of reading a cache several times larger than memory, over the course of the read.

    python benchmarks/bench_beyond_memory.py [--limit-mb 400] [--tokens 32768] [--repeats 3] [--io mmap]

A cache of LLaVA-1.5-7B's chunks (64 tokens x 4096 channels, int8, 8 layers) is read once by
`clt.train.reader` in random chunk order, by a process in a memory control group: what it holds and the page
cache that it fills share the limit, which is full after the first part of the read. Nothing is done with the
tokens, so that pages come as fast as they can. Each process begins with no page of the cache in memory.
Shown are the fifths of the read, medians of the repeats: stored GB/s, which are the disk's where the disk is
slow, and processor seconds a GB, which hold what the kernel does to make room. "dropped": a chunk's pages are
given back as soon as it is decoded (madvise, posix_fadvise DONTNEED), which is not what `clt` does.

Needs root and control groups (run with version 1; version 2 differs in two names of files).
"""

import argparse
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from bench_read import drop_pages

from clt.cache_format import CacheWriter, Manifest, open_cache
from clt.cache_format.layout import SITES
from clt.cache_format.shard import Shard
from clt.train.reader import Reader
from clt.train.source import Source

LAYERS, WIDTH, WINDOW, SPLIT = 8, 4096, 4096, "train"
BUFFER, BATCH = 1024, 512
PARTS = 5
"""Of an epoch, each with its speed."""
GROUPS = Path("/sys/fs/cgroup")
COLUMNS = ("io", "memory", "pages", "GB/s by fifths", "processor s/GB by fifths", "peak MB")


class Kind(NamedTuple):
    io: str
    limit_mb: int | None
    drop: bool


class Course(NamedTuple):
    """How one read went; GB are stored bytes."""

    speeds: list[float]
    """GB/s of each part"""
    work: list[float]
    """processor seconds a GB, of each part"""
    peak: int
    """bytes charged to the group at most"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-mb", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--io", nargs="*", default=["mmap", "pread"])
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--child", nargs=4, metavar=("CACHE", "IO", "GROUP", "DROP"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        path, io, group, drop = asked.child
        print(json.dumps(read(Path(path), io, Path(group), drop == "drop")._asdict()))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = write_cache(Path(folder) / "large.cache", asked.tokens)
        compare(path, asked.io, asked.limit_mb, asked.repeats)


def compare(path: Path, ios: list[str], limit_mb: int, repeats: int) -> None:
    kinds = [
        Kind(io, limit, drop)
        for io in ios
        for limit, drop in ((limit_mb, False), (limit_mb, True), (None, False))
    ]
    found: dict[Kind, list[Course]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            drop_pages(path)
            found[kind].append(in_child(path, kind))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for kind, runs in found.items():
        cells = [kind.io, f"{kind.limit_mb} MB" if kind.limit_mb else "none"]
        cells.append("dropped after use" if kind.drop else "left to the kernel")
        for part in ("speeds", "work"):
            fifths = zip(*(getattr(run, part) for run in runs), strict=True)
            cells.append(" ".join(f"{statistics.median(fifth):.2f}" for fifth in fifths))
        cells.append(f"{statistics.median(run.peak for run in runs) / 1e6:.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def in_child(path: Path, kind: Kind) -> Course:
    with control_group(kind.limit_mb) as group:
        child = ["--child", str(path), kind.io, str(group), "drop" if kind.drop else "leave"]
        done = subprocess.run(
            [sys.executable, __file__, *child], check=True, stdout=subprocess.PIPE, text=True
        )
    return Course(**json.loads(done.stdout))


def read(path: Path, io: str, group: Path, drop: bool) -> Course:
    """One epoch, by a process that joins the group first."""
    if drop:
        drop_after_use()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    source = Source([path], SPLIT, io=io)
    speeds, work, batches = [], [], source.n_tokens // BATCH
    size = open_cache(path)[SPLIT].bytes / source.n_tokens * BATCH / 1e9
    with Reader(source, buffer_tokens=BUFFER, seed=0) as reader:
        for part in range(PARTS):
            count = (part + 1) * batches // PARTS - part * batches // PARTS
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(count):
                reader.next(BATCH)
            speeds.append(count * size / (time.perf_counter() - began))
            work.append((time.process_time() - worked) / (count * size))
    peak = next(f for f in ("memory.max_usage_in_bytes", "memory.peak") if (group / f).exists())
    return Course(speeds, work, int((group / peak).read_text()))


def drop_after_use() -> None:
    """Give a chunk's pages back as soon as it is decoded."""
    plain = Shard.decode

    def decode(self: Shard, slot: int, out: npt.NDArray[Any]) -> int:
        read = plain(self, slot, out)
        start, size = self._place(slot)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED, first, start + size - first)
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), first, start + size - first, os.POSIX_FADV_DONTNEED)
        return read

    Shard.decode = decode  # type: ignore[method-assign]


@contextmanager
def control_group(limit_mb: int | None) -> Iterator[Path]:
    """A memory control group of this process's own making, gone afterwards."""
    second = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if second else GROUPS / "memory") / f"bench-{os.getpid()}"
    group.mkdir()
    try:
        if limit_mb:
            file = "memory.max" if second else "memory.limit_in_bytes"
            (group / file).write_text(str(limit_mb * 10**6))
        yield group
    finally:
        group.rmdir()


def write_cache(path: Path, n_tokens: int) -> Path:
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="int8",
        step_divisor=8.0,
        window=WINDOW,
        seed=0,
        world_size=1,
        source={"model": "random numbers"},
    )
    some = np.random.default_rng(0).standard_normal((WINDOW, LAYERS, WIDTH), np.float32)
    columns = {name: np.zeros(WINDOW, int) for name in ("position", "token_id", "kind", "row", "col")}
    with CacheWriter(path, manifest) as writer:
        for number in range(n_tokens // WINDOW):
            sample = {"sample": np.full(WINDOW, number)}
            values = dict.fromkeys(SITES, some)
            writer.add(SPLIT, number, {"sample": number, "id": str(number)}, columns | sample, values)
        writer.finish()
    gc.collect()
    stored = open_cache(path)[SPLIT].bytes
    print(f"{n_tokens} tokens, {LAYERS} layers x {WIDTH}, {stored / 1e9:.2f} GB stored\n", flush=True)
    return path


if __name__ == "__main__":
    main()
