"""What int8 does to training: the demo's transcoder, trained from int8 and from bf16, scored on true values.

    python benchmarks/bench_precision.py [--tokens 16384] [--layers 0-29:3]

Needs the demo's model and data (`make demo`, or `python demo/build.py demo/out`). One harvest is stored in
bf16; its values, every token in its place, are encoded again as int8. Held-out FVU is measured on the bf16
cache's split val, input and target (**true**), and on that of the cache that the run was trained from
(own). Another seed from bf16 shows what chance does.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from clt.cache_format import Cache, CacheWriter, open_cache
from clt.cache_format.layout import SITES, SPLITS
from clt.cache_format.permutation import permutation
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train

OUT = Path(__file__).parents[1] / "demo" / "out"
COLUMNS = ("trained from", "seed", "bits a value", "noise of the codes", "held-out FVU, **true**", "own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layers", default="0-29:3")
    parser.add_argument("--out", type=Path, default=OUT / "precision", help="folder for caches and runs")
    asked = parser.parse_args()
    true = harvest_bf16(asked.out / "bf16.cache", asked.tokens, asked.layers)
    caches = {"bf16": true}
    for divisor in (8, 16):
        name = f"int8, step rms/{divisor}"
        caches[name] = encode_again(true, asked.out / f"int8-{divisor}.cache", divisor)
    layers = true.manifest.n_layers
    print(f"{len(true['train'])} train and {len(true['val'])} held-out tokens, {layers} layers")
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, seed in [("bf16", 0), *((name, 0) for name in caches if name != "bf16"), ("bf16", 1)]:
        print(row(name, seed, caches[name], true, asked.out), flush=True)


def harvest_bf16(path: Path, tokens: int, layers: str) -> Cache:
    """The demo's activations, bit for bit what bfloat16 holds of them."""
    command = [
        *("harvest", str(OUT / "model"), str(OUT / "data" / "train.jsonl"), str(path), "--precision", "bf16"),
        *("--tokens", str(tokens), "--layers", layers, "--val-fraction", "0.1", "--window", "4096"),
        *("--batch-tokens", "2048", "--dtype", "float32"),
    ]
    timed("harvest", lambda: subprocess.run([sys.executable, "-m", "clt.cli", *command], check=True))
    return open_cache(path)


def encode_again(true: Cache, path: Path, divisor: int) -> Cache:
    """An int8 cache of the same tokens, each in the place that it has in `true`."""
    manifest = replace(true.manifest, precision="int8", step_divisor=float(divisor))
    with CacheWriter(path, manifest) as writer:
        for split in SPLITS if not writer.complete else ():
            add_split(writer, true, split)
        writer.finish()
    written = open_cache(path)
    for split in SPLITS:
        for name, column in true[split].tokens().items():
            assert np.array_equal(column, written[split].token_column(name)), (split, name)
    return written


def add_split(writer: CacheWriter, true: Cache, split: str) -> None:
    tokens, start = true[split].tokens(), 0
    for entry in true[split].entries:
        stop = start + entry.tokens
        # what arrived as token p of the window lies where the permutation holds p
        arrived = np.argsort(permutation(entry.tokens, true.manifest.seed, entry.window))
        columns = {name: column[start:stop][arrived] for name, column in tokens.items() if name != "sink"}
        values = {site: true[split].read(site, start=start, stop=stop)[arrived] for site in SITES}
        line = {"sample": SPLITS.index(split) + 2 * entry.window, "id": f"{split}, window {entry.window}"}
        writer.add(split, entry.window, line, columns, values)
        start = stop


def row(name: str, seed: int, cache: Cache, true: Cache, out: Path) -> str:
    run = out / f"run-{cache.path.stem}-{seed}"
    config = TrainConfig(  # as demo/run.py has it
        caches=(cache.path,),
        run=run,
        transcoder=TranscoderConfig(n_targets=16, k=32, expansion_factor=2),
        exclude=("bos", "sink"),
        batch_tokens=512,
        epochs=2,
        lr=2e-3,
        lr_warmup_steps=10,
        seed=seed,
    )
    timed(f"train {run.name}", lambda: train(config, resume=run.exists()))
    model = load_transcoder(run)
    on_true, own = (
        evaluate(model, open_source(config, "val", (path,))).fvu.mean() for path in (true.path, cache.path)
    )
    train_split = cache["train"]
    values = 2 * len(train_split) * cache.manifest.n_layers * cache.manifest.d_model
    noise = np.mean([train_split.statistics(site).noise_fvu for site in SITES])
    bits = 8 * train_split.bytes / values
    return f"| {name} | {seed} | {bits:.2f} | {noise:.1e} | **{on_true:.5f}** | {own:.5f} |"


def timed(name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    work()
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
