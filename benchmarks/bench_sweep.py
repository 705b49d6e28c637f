"""Eight configurations as one sweep, against the same eight one after the other.

    python benchmarks/bench_sweep.py [CACHE] [--steps 8] [--batch-tokens 1024] [--latents 288] [--repeats 3]

Without CACHE, one of SmolLM2's width (8 layers x 576, int8, random numbers) is written to a temporary folder.
Both ways write the same run folders, whose tensors are compared; they take turns, so that a busy machine
slows both. Bytes are those read from the cache's shards, held-out tokens included. Shown too: what share of
the sweep's seconds goes into making values of stored numbers, once for each run; no more than that could be
saved by sharing the standardised values as well.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

from clt.cache_format import CacheWriter, Manifest
from clt.cache_format.layout import SITES
from clt.train.config import TrainConfig
from clt.train.loop import train
from clt.train.reader import Batch
from clt.train.sweep import sweep
from clt.train.sweep_file import Entry, sweep_configs

LAYERS, WIDTH, SAMPLE = 8, 576, 64
GRID = [{"k": k, "seed": seed} for k in (4, 8, 16, 32) for seed in (0, 1)]


class Cost(NamedTuple):
    seconds: float
    processor: float
    """Seconds of all threads"""
    read: int
    """Bytes of shards"""
    values: float
    """Seconds in which stored numbers became values"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=WIDTH // 2)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = asked.cache or write_cache(folder / "cache", asked.steps * asked.batch_tokens)
        options = {
            "caches": (cache,),
            "latents": asked.latents,
            "n_targets": 4,
            "lr": 1e-3,
            "io": "pread",
            "steps": asked.steps,
            "batch_tokens": asked.batch_tokens,
            "seed": 0,
            "order_seed": None,
        }
        entries = [Entry(f"k={s['k']},seed={s['seed']}", s) for s in GRID]
        compare(options, entries, folder, asked.repeats)


def compare(options: dict[str, Any], entries: list[Entry], folder: Path, repeats: int) -> None:
    """Print the table."""
    costs: dict[str, list[Cost]] = {"one sweep": [], "one after the other": []}
    for number in range(repeats):
        configs = sweep_configs(options, entries, folder / f"sweep-{number}")
        alone = [replace(c, run=folder / f"alone-{number}" / c.run.name) for c in configs]
        costs["one sweep"].append(cost_of(lambda c=configs: sweep(c[0].run.parent, entries, c, False)))  # type: ignore[misc]
        costs["one after the other"].append(cost_of(lambda c=alone: [train(config) for config in c]))  # type: ignore[misc]
        for one, other in zip(configs, alone, strict=True):
            require_same(one, other)
    sizes = f"{len(entries)} runs of {options['steps']} steps of {options['batch_tokens']} tokens"
    print(f"{sizes}, {options['latents']} latents; the same weights both ways\n")
    print("| | seconds | spread | processor s | MB read |\n|---|---|---|---|---|")
    for way, found in costs.items():
        seconds = [cost.seconds for cost in found]
        print(
            f"| {way} | {statistics.median(seconds):.1f} | {min(seconds):.1f}-{max(seconds):.1f} | "
            f"{statistics.median(cost.processor for cost in found):.1f} | {found[0].read / 1e6:.1f} |"
        )
    ours, theirs = costs.values()
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    share = statistics.median(cost.values / cost.seconds for cost in ours)
    less = theirs[0].read / ours[0].read
    faster = statistics.median(ratios)
    print(f"\nthe sweep is faster by {faster:.2f}x and reads 1/{less:.2f}; {share:.1%} of its seconds make")
    print("values of stored numbers")


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Counts bytes of shards and seconds of `Batch.values`."""
    found = {"read": 0.0, "values": 0.0}
    preadv, values = os.preadv, Batch.values

    def reading(*arguments: Any) -> int:
        read = preadv(*arguments)
        found["read"] += read
        return read

    def making(*arguments: Any) -> Any:
        began = time.perf_counter()
        made = values(*arguments)
        found["values"] += time.perf_counter() - began
        return made

    os.preadv, Batch.values = reading, making  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        os.preadv, Batch.values = preadv, values  # type: ignore[method-assign]


def cost_of(act: Callable[[], object]) -> Cost:
    began, processor = time.perf_counter(), time.process_time()
    with counted() as found, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        act()
    seconds, of_threads = time.perf_counter() - began, time.process_time() - processor
    return Cost(seconds, of_threads, int(found["read"]), found["values"])


def require_same(one: TrainConfig, other: TrainConfig) -> None:
    steps = [config.run / (config.run / "latest").read_text() for config in (one, other)]
    for path in steps[0].rglob("*.safetensors"):
        mine, theirs = load_file(path), load_file(steps[1] / path.relative_to(steps[0]))
        if not all(bool((mine[name] == theirs[name]).all()) for name in mine):
            raise SystemExit(f"{path} differs")


def write_cache(path: Path, n_tokens: int) -> Path:
    """Random numbers, for a read is a read."""
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="int8",
        step_divisor=8.0,
        window=2048,
        seed=0,
        world_size=1,
        source={"model": "random numbers"},
    )
    rng = np.random.default_rng(0)
    n = np.zeros(SAMPLE, int)
    with CacheWriter(path, manifest, threads=2) as writer:
        for split, count in (("train", n_tokens // SAMPLE), ("val", 8)):
            for number in range(count):
                columns = {
                    "sample": n + number,
                    "position": np.arange(SAMPLE),
                    "token_id": n,
                    "kind": n.astype(np.uint8),
                    "row": n - 1,
                    "col": n - 1,
                }
                values = {site: rng.standard_normal((SAMPLE, LAYERS, WIDTH), np.float32) for site in SITES}
                writer.add(split, number, {"sample": number, "id": f"{split} {number}"}, columns, values)
        writer.finish()
    return path


if __name__ == "__main__":
    main()
