"""Writing speed of a cache, as a ratio to what the codec alone does on the same threads, in one run.

    python benchmarks/bench_write.py [--threads 2] [--tokens 16384] [--folder DIR] [--repeats 3]

Values are random, not a model's: Student's t with 4 degrees of freedom, a size of its own for each channel
and token, and a few massive channels. The codec alone quantises (or rounds to bf16) and encodes the same
vectors, 512 tokens of one layer and site at a time. The writer also keeps statistics, permutes, checks,
writes and syncs; in memory (/dev/shm) where no --folder is given, so that no disk is measured. GB/s are of
bf16-equivalent bytes, by the clock; "CPU" is the ratio of the processor's seconds, which other work on the
machine hardly changes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clt.cache_format import CacheWriter, Manifest
from clt.cache_format.bf16 import to_bf16_bits
from clt.cache_format.codec import encode_chunk
from clt.cache_format.int8 import quantise
from clt.cache_format.layout import CHUNK, SITES, TOKEN_COLUMNS

Values = dict[str, npt.NDArray[np.float32]]
SHAPES = {"LLaVA": (4, 4096), "SmolLM2": (30, 576)}
"""Layers (of LLaVA only some) and width."""
AT_ONCE = 512
"""Tokens of one sample."""
WINDOW = 2048
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3, help="best of so many, taken in turn")
    parser.add_argument("--folder", type=Path, default=MEMORY, help="where the caches are made")
    asked = parser.parse_args()
    print("| width | precision | codec alone, GB/s | writer, GB/s | ratio | CPU |\n|---|---|---|---|---|---|")
    for model, (layers, width) in SHAPES.items():
        values = make_values(layers, width)
        size = asked.tokens * 2 * layers * width * 2 / 1e9
        for precision in ("int8", "bf16"):
            alone, whole = [], []
            for _ in range(asked.repeats):
                encode = partial(encode_alone, values, precision, asked.tokens, asked.threads)
                alone.append(seconds(encode))
                with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
                    path = Path(folder) / "cache"
                    whole.append(
                        seconds(partial(write, path, values, precision, asked.tokens, asked.threads))
                    )
            (clock, processor), (clock_whole, processor_whole) = (
                map(min, zip(*times, strict=True)) for times in (alone, whole)
            )
            cells = [f"{width} ({model})", precision, f"{size / clock:.3f}", f"{size / clock_whole:.3f}"]
            cells += [f"{clock / clock_whole:.2f}", f"{processor / processor_whole:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processor over all threads."""
    began, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - spent


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


def encode_alone(values: Values, precision: str, tokens: int, threads: int) -> None:
    def encode(part: npt.NDArray[np.float32]) -> None:
        stored: tuple[npt.NDArray[Any], ...] = (
            quantise(part, 8.0) if precision == "int8" else (to_bf16_bits(part),)
        )
        for array in stored:
            for start in range(0, len(array), CHUNK):
                encode_chunk(array[start : start + CHUNK])

    vectors = [site[:, layer] for site in values.values() for layer in range(site.shape[1])]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(encode, vectors * (tokens // AT_ONCE)))


def write(path: Path, values: Values, precision: str, tokens: int, threads: int) -> None:
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
    with CacheWriter(path, manifest, threads=threads) as writer:
        for sample in range(tokens // AT_ONCE):
            columns["sample"][:] = sample
            writer.add("train", sample, {"sample": sample, "id": str(sample)}, columns, values)
        writer.finish()


if __name__ == "__main__":
    main()
