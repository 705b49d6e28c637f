"""One run in two processes against the same run in one: tokens/s, and bytes beside what is predicted.

    python benchmarks/bench_ranks.py [--layers 8] [--width 576] [--steps 12] [--ranks 2]

The cache is random numbers of the size of SmolLM2-135M's. One process is measured with one thread and with as
many as there are ranks; each rank has one. Two ranks on two cores are to be held against one process on two:
against one process on one core they also have twice the hardware. Runs take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from clt.cache_format import CacheWriter, Manifest
from clt.cache_format.layout import SITES

TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 8), ("width", 576), ("steps", 12), ("ranks", 2), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_random(Path(folder) / "cache", asked.layers, asked.width)
        compare(asked, cache, Path(folder))


def compare(asked: argparse.Namespace, cache: Path, folder: Path) -> None:
    ways = {"1 process, 1 thread": (1, 1), f"1 process, {asked.ranks} threads": (1, asked.ranks)}
    ways[f"{asked.ranks} processes, 1 thread each"] = (asked.ranks, 1)
    best: dict[str, float] = {}
    table = ""
    for turn in range(asked.repeats):
        for name, (ranks, threads) in ways.items():
            run = folder / f"run-{ranks}-{threads}-{turn}"
            errors = train(asked, cache, run, ranks, threads)
            best[name] = max(best.get(name, 0.0), median_speed(run))
            if "rank   reads" in errors:
                table = errors[errors.index("rank   reads") :].split("held out")[0]
    print(
        f"{asked.layers} layers of {asked.width} channels, {2 * asked.width} latents, k 32, "
        f"{asked.batch_tokens} tokens a step; load {os.getloadavg()[0]:.1f} at the end"
    )
    print("\n| | tokens/s | over 1 process, 1 thread |\n|---|---|---|")
    first = next(iter(best.values()))
    for name, speed in best.items():
        print(f"| {name} | {speed:.0f} | {speed / first:.2f} |")
    print(f"\n{table}")


def train(asked: argparse.Namespace, cache: Path, run: Path, ranks: int, threads: int) -> str:
    """What it wrote to stderr."""
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    words = [*(program if ranks > 1 else [sys.executable]), "-m", "clt.cli", "train", str(cache)]
    words += ["--run-name", run.name, "--out", str(run), "--steps", str(asked.steps), "--threads", "1"]
    words += ["--epochs", "99", "--batch-tokens", str(asked.batch_tokens), "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def median_speed(run: Path) -> float:
    """Tokens/s of a step, reading included; without the first two, in which memory is taken."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(np.median([line["tokens_per_s"] for line in lines[2:]]))


def write_random(path: Path, layers: int, width: int) -> Path:
    rng = np.random.default_rng(0)
    manifest = Manifest(
        d_model=width,
        layers=tuple(range(layers)),
        precision="int8",
        step_divisor=8.0,
        window=4096,
        seed=0,
        world_size=1,
        source={"model": "random"},
    )
    columns = {name: np.zeros(256, int) for name in ("token_id", "kind", "row", "col")}
    with CacheWriter(path, manifest, threads=1) as writer:
        for sample in range(TOKENS // 256):
            values = {site: rng.standard_normal((256, layers, width), np.float32) for site in SITES}
            own = {"sample": np.full(256, sample), "position": np.arange(256), **columns}
            writer.add("train", sample, {"sample": sample, "id": str(sample)}, own, values)
        writer.finish()
    return path


if __name__ == "__main__":
    main()
