"""Writing speed of a cache, as ratios to what the codec, and zstd, alone do on the same threads, in one run.

    python benchmarks/bench_write.py [--threads 2] [--tokens 65536] [--folder DIR] [--repeats 3]

Values are random, not a model's: Student's t with 4 degrees of freedom, a size of its own for each channel
and token, and a few massive channels. The codec alone quantises (or rounds to bf16) and encodes the same
vectors, 512 tokens of one layer and site at a time; "zstd alone" is the same with the library's encoder in
place of huffman.c. The writer also keeps statistics, permutes, checks, writes and syncs; it is timed from its
third window on, when all its windows have their memory. Files lie in memory (/dev/shm) where no --folder is
given, so that no disk is measured, and are removed once they are synced: a virtual machine takes four times
as long for a page that it never had. "Codec and files" is the codec's speed where its bytes also go into
files there, and nothing else is done. GB/s are of bf16-equivalent bytes, by the clock; "CPU" is the ratio of
the processor's seconds, which other work on the machine hardly changes. Ratios are medians of the rounds'.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clt.cache_format import CacheWriter, Manifest, huffman
from clt.cache_format.bf16 import to_bf16_bits
from clt.cache_format.codec import Frames, encode_chunks, encode_planes, planes
from clt.cache_format.gathered import chunks_at_once
from clt.cache_format.int8 import quantise
from clt.cache_format.layout import CHUNK, SITES, TOKEN_COLUMNS


class Seconds(NamedTuple):
    clock: float
    cpu: float
    """of all threads"""


Values = dict[str, npt.NDArray[np.float32]]
SHAPES = {"LLaVA": (8, 4096), "SmolLM2": (30, 576)}
"""Layers (of LLaVA only some) and width."""
AT_ONCE = 512
"""Tokens of one sample."""
WINDOW = 16_384
"""As `clt harvest` has it where nothing is asked for."""
FIRST = 2 * WINDOW
"""Tokens that are written before it is timed: windows get their memory then, and use it again."""
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, taken in turn")
    parser.add_argument("--folder", type=Path, default=MEMORY, help="where the caches are made")
    asked = parser.parse_args()
    print("| width | precision | zstd alone, GB/s | codec alone | codec and files | writer |", end="")
    print(" of zstd | CPU | of the codec | CPU |")
    print("|---" * 10 + "|")
    for model, (layers, width) in SHAPES.items():
        values = make_values(layers, width)
        size = asked.tokens * 2 * layers * width * 2 / 1e9
        for precision in ("int8", "bf16"):
            rounds = [one_round(values, precision, asked) for _ in range(asked.repeats)]
            cells = [f"{width} ({model})", precision]
            cells += [f"{statistics.median(size / one[nth].clock for one in rounds):.3f}" for nth in range(4)]
            for limit in (0, 1):
                for kind in Seconds._fields:
                    ratios = [getattr(one[limit], kind) / getattr(one[3], kind) for one in rounds]
                    cells.append(f"{statistics.median(ratios):.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)


def one_round(values: Values, precision: str, asked: argparse.Namespace) -> tuple[Seconds, ...]:
    """zstd alone, the codec alone, the codec and files, the writer."""
    encode = partial(encode_alone, values, precision, asked.tokens, asked.threads)
    with library_encodes():
        library = seconds(encode)
    alone = seconds(encode)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        files = seconds(partial(encode, Path(folder)))
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        whole = write(Path(folder) / "cache", values, precision, asked.tokens, asked.threads)
    return library, alone, files, whole


@contextmanager
def library_encodes() -> Iterator[None]:
    """As where huffman.c is not compiled."""
    compiled, huffman.COMPILED = huffman.COMPILED, False
    yield
    huffman.COMPILED = compiled


def seconds(work: Callable[[], None]) -> Seconds:
    began, spent = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - began, time.process_time() - spent)


def make_values(layers: int, width: int) -> Values:
    """site -> (token, layer, d_model), a view of (layer, token, d_model) as a harvest hands it over."""
    rng = np.random.default_rng(0)
    values = {}
    for site in SITES:
        drawn = rng.standard_t(4, (layers, AT_ONCE, width)).astype(np.float32)
        drawn *= rng.lognormal(0, 0.5, width).astype(np.float32)
        drawn *= rng.lognormal(0, 0.3, (AT_ONCE, 1)).astype(np.float32)
        drawn[:, :, rng.integers(0, width, 3)] *= 20
        values[site] = drawn.swapaxes(0, 1)
    return values


def encode_alone(
    values: Values, precision: str, tokens: int, threads: int, folder: Path | None = None
) -> None:
    """folder: where what is encoded goes, a file for each layer, site and AT_ONCE tokens."""

    def encode(nth: int) -> None:
        part = vectors[nth % len(vectors)]
        stored: tuple[npt.NDArray[Any], ...] = (
            quantise(part, 8.0) if precision == "int8" else (to_bf16_bits(part),)
        )
        parts = (part for array in stored for frames in encode_all(array) for part in frames.parts)
        if folder is None:
            deque(parts, maxlen=0)
            return
        with open(folder / str(nth), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        (folder / str(nth)).unlink()

    vectors = [site[:, layer] for site in values.values() for layer in range(site.shape[1])]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(encode, range(len(vectors) * (tokens // AT_ONCE))))


def encode_all(array: npt.NDArray[Any]) -> Iterator[Frames]:
    """As the writer does, several chunks in a call where they are small."""
    chunks = array.reshape(-1, CHUNK, array.shape[1])
    at_once = chunks_at_once(array.shape[1])
    for start in range(0, len(chunks), at_once):
        some = chunks[start : start + at_once]
        if array.dtype == np.uint16:
            low, high = planes(some)
            yield encode_planes(low.reshape(some.shape), high.reshape(some.shape))
        else:
            yield encode_chunks(some)


def write(path: Path, values: Values, precision: str, tokens: int, threads: int) -> Seconds:
    _, layers, width = values["mlp_in"].shape
    manifest = Manifest(
        d_model=width,
        layers=tuple(range(layers)),
        precision=precision,
        step_divisor=8.0 if precision == "int8" else 0.0,
        window=WINDOW,
        seed=0,
        world_size=1,
        source={"model": "random"},
    )
    columns = {name: np.zeros(AT_ONCE, dtype) for name, dtype in TOKEN_COLUMNS.items() if name != "sink"}
    columns["kind"] = (np.arange(AT_ONCE) // 100 % 4).astype(np.uint8)

    def remove_files() -> None:
        for file in [*path.glob("*/**/c.*")]:
            remover.submit(file.unlink)

    with (
        ThreadPoolExecutor(1) as remover,
        CacheWriter(path, manifest, threads=threads, after_commit=remove_files) as writer,
    ):

        def add(samples: range) -> None:
            for sample in samples:
                columns["sample"][:] = sample
                writer.add("train", sample, {"sample": sample, "id": str(sample)}, columns, values)

        add(range(FIRST // AT_ONCE))
        writer.flush()

        def go_on() -> None:
            add(range(FIRST // AT_ONCE, (FIRST + tokens) // AT_ONCE))
            writer.finish()

        return seconds(go_on)


if __name__ == "__main__":
    main()
