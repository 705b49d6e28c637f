"""How fast a cache is read in random chunk order, beside the codec alone and beside other readers.

    python benchmarks/bench_read.py [--tokens 4096] [--windows 2] [--threads 2] [--repeats 5] [--folder DIR]

A cache of LLaVA-1.5-7B's width (32 layers x 4096 channels, int8, in and out) is written to a temporary
folder with values of the demo model's shape (heavy tails by channel and by token; the bits a value are
printed). Each reader then delivers every chunk once, codes and scales of both sites, in the same random order
of chunks and in the same buffers. The limit decodes the same stored bytes, already in memory, with the same
threads and nothing else. Readers take turns; shown is the median of the rounds' speeds, in
bf16-equivalent bytes, and of their ratios to the limit in the same round; "CPU" is that ratio of the
processor's seconds, which other work on the machine hardly changes. Cold: the kernel drops the files' pages
first.

With more --windows the first one's files appear under the names of further windows: where a cache has many,
each chunk of a buffer lies in a shard of its own, and only --tokens of them are read.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorstore
import zarr
from bench_many_files import add_windows

from clt.cache_format import CacheWriter, Manifest, open_cache
from clt.cache_format.codec import decode_chunk
from clt.cache_format.layout import CHUNK, SITES
from clt.cache_format.open_shards import InWindow
from clt.cache_format.summary import summarise_cache
from clt.train import reader as train_reader
from clt.train.order import ReadOrder
from clt.train.source import Source
from clt.train.stored_rows import Rows

Array = npt.NDArray[Any]
LAYERS, WIDTH = 32, 4096
WINDOW = 2048
BATCH = 512
SAMPLE = 256
SPLIT = "train"

Read = Callable[[Array], Any]
"""Deliver these chunks."""
Open = Callable[["Setting"], Read]


class Setting(NamedTuple):
    path: Path
    threads: int
    buffers: list[Array]
    """chunk numbers, buffer by buffer: an epoch in random order"""

    @property
    def n_tokens(self) -> int:
        return sum(len(chunks) for chunks in self.buffers) * CHUNK


class Seconds(NamedTuple):
    """Of an epoch."""

    clock: float
    cpu: float


class Reader(NamedTuple):
    name: str
    open: Open
    cold: bool = True
    """whether it can begin with no page in memory"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2, help="of the cache")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--only", help="readers whose name has this in it, and the limit")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = write_cache(Path(folder) / "llava.cache", min(asked.windows, 2) * WINDOW, asked.windows)
        source, size = Source([path], SPLIT), min(8192, asked.tokens // 2)
        order = ReadOrder(source.n_chunks, size, seed=0)
        buffers = [order.chunks(0, buffer) for buffer in range(asked.tokens // size)]
        setting = Setting(path, asked.threads, buffers)
        readers = [r for r in READERS if asked.only is None or asked.only in r.name or r is LIMIT]
        if asked.windows > 2:  # links have no uncompressed copy
            readers = [reader for reader in readers if reader.open is not raw_memmap]
        if any(reader.open is raw_memmap for reader in readers):
            write_raw(setting)
        check_equal(setting, readers)
        compare(setting, readers, asked.repeats)


def write_cache(path: Path, n_tokens: int, windows: int) -> Path:
    """A cache whose channels and tokens differ in size as a language model's do."""
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
    rng = np.random.default_rng(0)
    channel = np.exp(0.35 * rng.standard_normal((LAYERS, WIDTH), np.float32))
    with CacheWriter(path, manifest, threads=2) as writer:
        for number in range(n_tokens // SAMPLE):
            size = np.exp(0.3 * rng.standard_normal((SAMPLE, LAYERS, 1), np.float32)) * channel
            values = {s: size * rng.standard_normal(size.shape, np.float32) for s in SITES}
            writer.add(SPLIT, number, {"sample": number, "id": str(number)}, columns(number), values)
        if windows * WINDOW == n_tokens:
            writer.finish()
    if windows * WINDOW > n_tokens:
        add_windows(path, windows, lambda old, new: new.hardlink_to(old))
    cache = open_cache(path)
    shape = f"{len(cache[SPLIT])} tokens in {windows} windows, {LAYERS} layers x {WIDTH}"
    print(f"{shape}, {summarise_cache(cache)['bits_per_value']:.2f} bits a value\n")
    return path


def columns(sample: int) -> dict[str, Array]:
    zero = np.zeros(SAMPLE, np.int64)
    return {
        "sample": zero + sample,
        "position": np.arange(SAMPLE),
        "token_id": zero,
        "kind": zero.astype(np.uint8),
        "row": zero - 1,
        "col": zero - 1,
    }


def limit(setting: Setting, reads: bool = False) -> Read:
    """The codec alone: chunks as bytes in memory, decoded into place; reads: codes are read from the file
    first, into a buffer that stays in the processor's cache."""
    source, pool = Source([setting.path], SPLIT), ThreadPoolExecutor(setting.threads)
    rows = source.allocate(max(map(len, setting.buffers)))
    split = open_cache(setting.path, io="pread" if reads else "mmap")[SPLIT]
    stored: dict[tuple[str, int, int], list[Callable[[], memoryview]]] = {}
    wanted = np.concatenate(setting.buffers)
    places = split.chunk_places(wanted)
    numbered = list(zip(wanted.tolist(), places.window.tolist(), places.slot.tolist(), strict=True))
    for site, layer in product(SITES, range(LAYERS)):
        for chunk, window, slot in numbered:
            ((shards, _),) = split.fetch(site, layer, [InWindow(window, [slot], [0])]).wanted
            held = [partial(memoryview, bytes(shard.stored(slot))) for shard in shards]
            stored[site, layer, chunk] = [partial(shards[0].stored, slot), held[1]] if reads else held

    def decode(task: tuple[str, int, Array]) -> None:
        site, layer, chunks = task
        for at, chunk in enumerate(chunks.tolist()):
            part = slice(at * CHUNK, (at + 1) * CHUNK)
            codes, scale = stored[site, layer, chunk]
            decode_chunk(codes(), rows.codes[site][layer, part])
            decode_chunk(scale(), rows.scales[site][layer, part])

    def read(chunks: Array) -> Rows:
        list(pool.map(decode, [(site, layer, chunks) for site in SITES for layer in range(LAYERS)]))
        return rows

    return read


def ours(setting: Setting, io: str) -> Read:
    source, pool = Source([setting.path], SPLIT, io=io), ThreadPoolExecutor(setting.threads)
    rows = source.allocate(max(map(len, setting.buffers)))

    def read(chunks: Array) -> Rows:
        source.fill(rows, chunks, pool)
        return rows

    return read


def batches(setting: Setting) -> Read:
    """What training takes: the buffers' tokens shuffled, and copied into batches."""
    size = max(map(len, setting.buffers)) * CHUNK
    reader = train_reader.Reader(
        Source([setting.path], SPLIT), buffer_tokens=size, seed=0, threads=setting.threads
    )

    def read(chunks: Array) -> None:
        for _ in range(len(chunks) * CHUNK // BATCH):
            reader.next(BATCH)
        if reader._ahead is not None:
            reader._ahead.result()  # nothing runs on beside the reader that is next

    return read


def zarr_python(setting: Setting, pipeline: str) -> Read:
    """Each chunk of tokens in one call, all layers together."""
    zarr.config.set({"codec_pipeline.path": pipeline, "threading.max_workers": setting.threads})
    group = zarr.open_group(setting.path / SPLIT, mode="r")
    arrays = [group[f"{site}{kind}"] for site in SITES for kind in ("", "_scale")]

    def read(chunks: Array) -> list[list[Array]]:
        return [[array[start : start + CHUNK] for array in arrays] for start in (chunks * CHUNK).tolist()]

    return read


def tensor_store(setting: Setting) -> Read:
    """All chunks asked for at once; as many threads as the others have, and no cache."""
    context = {"data_copy_concurrency": {"limit": setting.threads}, "cache_pool": {"total_bytes_limit": 0}}

    def opened(name: str) -> Any:
        store = {"driver": "file", "path": str(setting.path / SPLIT / name)}
        return tensorstore.open({"driver": "zarr3", "kvstore": store, "context": context}).result()

    arrays = [opened(f"{site}{kind}") for site in SITES for kind in ("", "_scale")]

    def read(chunks: Array) -> list[list[Array]]:
        asked = [
            [array[start : start + CHUNK].read() for array in arrays] for start in (chunks * CHUNK).tolist()
        ]
        return [[future.result() for future in row] for row in asked]

    return read


def write_raw(setting: Setting) -> None:
    """The same numbers without a codec, one file an array."""
    source = Source([setting.path], SPLIT)
    rows = source.allocate(source.n_chunks)
    with ThreadPoolExecutor(setting.threads) as pool:
        source.fill(rows, np.arange(source.n_chunks), pool)
    for name, array in raw_arrays(rows):
        with open(setting.path.with_name(name), "wb") as out:
            array.tofile(out)
            os.fsync(out.fileno())


def raw_arrays(rows: Rows) -> list[tuple[str, Array]]:
    return [(f"{kind}-{s}.raw", getattr(rows, kind)[s]) for kind in ("codes", "scales") for s in SITES]


def raw_memmap(setting: Setting) -> Read:
    """What bytes cost without a codec: a copy."""
    source, pool = Source([setting.path], SPLIT), ThreadPoolExecutor(setting.threads)
    tokens = source.n_chunks * CHUNK
    pairs = []
    for name, out in raw_arrays(source.allocate(max(map(len, setting.buffers)))):
        shape = (LAYERS, tokens, out.shape[2])
        pairs.append((np.memmap(setting.path.with_name(name), out.dtype, "r", shape=shape), out))

    def copy(task: tuple[Array, Array, int, Array]) -> None:
        stored, out, layer, chunks = task
        for at, chunk in enumerate(chunks.tolist()):
            out[layer, at * CHUNK : (at + 1) * CHUNK] = stored[layer, chunk * CHUNK : (chunk + 1) * CHUNK]

    def read(chunks: Array) -> None:
        list(pool.map(copy, [(m, out, layer, chunks) for m, out in pairs for layer in range(LAYERS)]))

    return read


LIMIT = Reader("limit: the codec alone", limit, cold=False)
READERS = (
    LIMIT,
    Reader("clt, mmap", partial(ours, io="mmap")),
    Reader("clt, pread", partial(ours, io="pread")),
    Reader("pread's limit: a read, and the codec", partial(limit, reads=True), cold=False),
    Reader("clt, mmap, shuffled into batches", batches, cold=False),
    Reader(
        "zarr-python as shipped",
        partial(zarr_python, pipeline="zarr.core.codec_pipeline.BatchedCodecPipeline"),
    ),
    Reader("zarr-python with zarrs", partial(zarr_python, pipeline="zarrs.ZarrsCodecPipeline")),
    Reader("TensorStore", tensor_store),
    Reader("raw memmap, uncompressed", raw_memmap),
)


def check_equal(setting: Setting, readers: list[Reader]) -> None:
    """All readers deliver the same numbers, or their speeds mean nothing."""
    chunks = setting.buffers[0][:3]
    expected = side_by_side(LIMIT.open(setting)(chunks), chunks)
    for reader in readers[1:]:
        found = reader.open(setting)(chunks)
        if found is not None:
            for one, other in zip(expected, side_by_side(found, chunks), strict=True):
                np.testing.assert_array_equal(one, other)


def side_by_side(found: Any, chunks: Array) -> list[Array]:
    """(token, layer, ...) of codes and scales of each site."""
    if isinstance(found, Rows):
        arrays = [array for s in SITES for array in (found.codes[s], found.scales[s])]
        return [array[:, : len(chunks) * CHUNK].swapaxes(0, 1).copy() for array in arrays]
    return [np.concatenate([row[i] for row in found]) for i in range(2 * len(SITES))]


def compare(setting: Setting, readers: list[Reader], repeats: int) -> None:
    warm = warm_times(setting, readers, repeats)
    cold = cold_times(setting, [reader for reader in readers if reader.cold], repeats)
    size = setting.n_tokens * LAYERS * WIDTH * len(SITES) * 2 / 1e9
    print("| reader | warm GB/s | of the limit | CPU | cold GB/s |\n|---|---|---|---|---|")
    for reader in readers:
        own = warm[reader.name]
        pairs = list(zip(warm[LIMIT.name], own, strict=True))
        cells = [f"{size / statistics.median(time.clock for time in own):.2f}"]
        cells.append(f"{statistics.median(a.clock / b.clock for a, b in pairs):.2f}")
        cells.append(f"{statistics.median(a.cpu / b.cpu for a, b in pairs):.2f}")
        from_disk = [time.clock for time in cold[reader.name]] if reader.cold else []
        cells.append(f"{size / statistics.median(from_disk):.2f}" if from_disk else "-")
        print(f"| {reader.name} | {' | '.join(cells)} |", flush=True)


def warm_times(setting: Setting, readers: list[Reader], repeats: int) -> dict[str, list[Seconds]]:
    """Of an epoch, by reader; files are open and in memory. Readers take turns buffer by buffer, each round
    another one first: the machine's own speed changes within seconds."""
    opened = {reader.name: reader.open(setting) for reader in readers}
    for read in opened.values():
        epoch(setting.buffers, read)
    found: dict[str, list[Seconds]] = {name: [] for name in opened}
    for nth in range(repeats):
        first = nth % len(readers)
        turns = [*opened.items()][first:] + [*opened.items()][:first]
        taken = [{name: epoch([chunks], read) for name, read in turns} for chunks in setting.buffers]
        for name, seconds in found.items():
            clocks, cpus = zip(*(one[name] for one in taken), strict=True)
            seconds.append(Seconds(sum(clocks), sum(cpus)))
    return found


def cold_times(setting: Setting, readers: list[Reader], repeats: int) -> dict[str, list[Seconds]]:
    """Of an epoch, by reader; nothing is open (mapped pages cannot be dropped) or in memory."""
    found: dict[str, list[Seconds]] = {reader.name: [] for reader in readers}
    for _ in range(repeats):
        for reader in readers:
            gc.collect()
            drop_pages(setting.path.parent)
            found[reader.name].append(epoch(setting.buffers, reader.open(setting)))
    return found


def epoch(buffers: list[Array], read: Read) -> Seconds:
    began, worked = time.perf_counter(), time.process_time()
    for chunks in buffers:
        read(chunks)
    return Seconds(time.perf_counter() - began, time.process_time() - worked)


def drop_pages(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
