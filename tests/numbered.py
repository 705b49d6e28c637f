"""A cache whose values spell the number of their token."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clt.cache_format import CacheWriter, Manifest

LAYERS, WIDTH = 2, 8


def write_cache(
    path: Path, n_tokens: int, window: int = 128, per_sample: int = 10, seed: int = 0, val: int = 0
) -> Path:
    """A cache whose mlp_in holds each token's own number, so that a batch can be told apart."""
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="bf16",
        step_divisor=0,
        window=window,
        seed=seed,
        world_size=1,
        source={"model": "fake"},
    )
    with CacheWriter(path, manifest, threads=1) as writer:
        for split, total in (("train", n_tokens), ("val", val)):
            for first in range(0, total, per_sample):
                number = np.arange(first, min(first + per_sample, total))
                columns = {
                    "sample": np.full(len(number), first // per_sample),
                    "position": number,
                    "token_id": number,
                    "kind": (number % 3 == 0).astype(np.uint8),
                    "row": np.full(len(number), -1),
                    "col": np.full(len(number), -1),
                }
                digits = np.stack(
                    [number % 100, number // 100, number * 0 + 1, *[number * 0] * (WIDTH - 3)], axis=1
                )
                values = np.repeat(digits[:, None].astype(np.float32), LAYERS, axis=1)
                line = {
                    "sample": first // per_sample + (10**6 if split == "val" else 0),
                    "id": f"{split}{first}",
                }
                writer.add(split, first, line, columns, {"mlp_in": values, "mlp_out": values + 1})
        writer.finish()
    return path


def numbers(batch: Any) -> np.ndarray:
    """The token numbers that the batch's own values spell, checked to agree in every layer and site."""
    spelled = []
    for layer in range(LAYERS):
        for site, shift in (("mlp_in", 0), ("mlp_out", 1)):
            values = batch.values(site, layer, torch.device("cpu"), torch.float32).numpy() - shift
            spelled.append((values[:, 0] + 100 * values[:, 1]).astype(int))
    assert all(np.array_equal(spelled[0], other) for other in spelled)
    return spelled[0]
