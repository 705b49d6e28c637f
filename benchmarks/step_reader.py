"""How many tokens a second the reader delivers: faster than that, a step would wait for it."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from clt.cache_format import CacheWriter, Manifest
from clt.train.reader import Reader
from clt.train.selection import Selection
from clt.train.shape import Shape
from clt.train.source import Source

STORED = 8192
"""Tokens of the cache: two buffers"""


def report(shape: Shape, batch_tokens: int, step_rate: float) -> None:
    """Print it for int8 codes of the shape's layers and width; step_rate: tokens/s of the step alone."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "cache", shape)
        rate = delivered(Path(folder) / "cache", batch_tokens, threads)
    print(
        f"\nThe reader delivers {rate:.0f} tokens/s from a warm cache ({threads} threads).\n"
        f"It would be the limit of a step that took more, {rate / step_rate:.1f} times as many as this one.\n"
        f"Beside this step, on the same processors, it takes {step_rate / rate:.1%} of its time.",
        flush=True,
    )


def delivered(cache: Path, batch_tokens: int, threads: int, seconds: float = 4.0) -> float:
    """Tokens/s of batches that nobody waits with; what was decoded before the clock began is left out."""
    source = Source((cache,), "train", selection=Selection())
    with Reader(source, buffer_tokens=STORED // 2, seed=0, threads=threads) as reader:
        reader.next(STORED)
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            tokens += len(reader.next(batch_tokens))
        return tokens / (time.perf_counter() - began)


def write_cache(path: Path, shape: Shape) -> None:
    """Random values, as hard to compress as any."""
    manifest = Manifest(
        d_model=shape.d_model,
        layers=shape.layers,
        precision="int8",
        step_divisor=8.0,
        window=STORED // 2,
        seed=0,
        world_size=1,
        source={"model": "random"},
    )
    rng, part = np.random.default_rng(0), 512
    with CacheWriter(path, manifest, threads=os.cpu_count() or 1) as writer:
        for number in range(STORED // part):
            size = (part, len(shape.layers), shape.d_model)
            values = {site: rng.standard_normal(size, np.float32) for site in ("mlp_in", "mlp_out")}
            columns = {
                "sample": np.full(part, number),
                "position": np.arange(part),
                "token_id": np.zeros(part, int),
                "kind": np.zeros(part, np.uint8),
                "row": np.full(part, -1),
                "col": np.full(part, -1),
            }
            writer.add("train", number, {"sample": number, "id": str(number)}, columns, values)
        writer.finish()
