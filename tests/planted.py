"""A cache of planted structure: sparse features of earlier layers write to later MLP outputs."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clt.cache_format import CacheWriter, Manifest

LAYERS, WIDTH, FEATURES = 3, 24, 30


def write_planted(
    path: Path, n_tokens: int, seed: int = 0, val: int = 0, precision: str = "int8", layers: int = LAYERS
) -> Path:
    """x_s = sparse code times a dictionary; y_t = all sources up to t times planted decoders, plus a mean."""
    world = np.random.default_rng(99)
    dictionary = world.standard_normal((layers, FEATURES, WIDTH)) / WIDTH**0.5
    decoders = world.standard_normal((layers, layers, FEATURES, WIDTH)) / WIDTH**0.5
    mean = world.standard_normal((layers, WIDTH))
    rng = np.random.default_rng(seed)
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(layers)),
        precision=precision,
        step_divisor=16.0 if precision == "int8" else 0.0,
        window=512,
        seed=seed,
        world_size=1,
        source={"model": "planted"},
    )
    with CacheWriter(path, manifest, threads=1) as writer:
        for split, total in (("train", n_tokens), ("val", val)):
            for first in range(0, total, 50):
                n = min(50, total - first)
                codes = rng.exponential(size=(n, layers, FEATURES)) * (
                    rng.random((n, layers, FEATURES)) < 0.1
                )
                x = np.einsum("tlf,lfd->tld", codes, dictionary) + mean
                y = np.stack(
                    [sum(codes[:, s] @ decoders[s, t] for s in range(t + 1)) for t in range(layers)], axis=1
                )
                sample = first // 50 + (10**6 if split == "val" else 0)
                values = {"mlp_in": x.astype(np.float32), "mlp_out": (y - 2 * mean).astype(np.float32)}
                writer.add(split, first, {"sample": sample, "id": str(sample)}, _columns(sample, n), values)
        writer.finish()
    return path


class World(NamedTuple):
    """What was planted."""

    path: Path
    dictionary: npt.NDArray[np.float64]
    """(layer, feature, d_model): the directions that features have in MLP inputs"""
    decoders: npt.NDArray[np.float64]
    """(source, target, feature, d_model): what they write to MLP outputs"""


def write_orthogonal(
    path: Path, n_tokens: int, layers: int = 3, width: int = 32, features: int = 24
) -> World:
    """Features of orthogonal directions, so that each is to be read from its own direction alone."""
    rng = np.random.default_rng(7)
    square = rng.standard_normal((layers, width, width))
    dictionary = np.linalg.qr(square)[0][:, :features]
    decoders = rng.standard_normal((layers, layers, features, width)) / width**0.5
    manifest = Manifest(
        d_model=width,
        layers=tuple(range(layers)),
        precision="bf16",
        step_divisor=0.0,
        window=1024,
        seed=0,
        world_size=1,
        source={"model": "planted"},
    )
    with CacheWriter(path, manifest, threads=1) as writer:
        for number, first in enumerate(range(0, n_tokens, 200)):
            n = min(200, n_tokens - first)
            active = rng.random((n, layers, features)) < 2 / features
            codes = active * (0.5 + rng.exponential(size=active.shape))
            x = np.einsum("tlf,lfd->tld", codes, dictionary)
            y = [sum(codes[:, s] @ decoders[s, t] for s in range(t + 1)) for t in range(layers)]
            values = {"mlp_in": x.astype(np.float32), "mlp_out": np.stack(y, axis=1).astype(np.float32)}
            line = {"sample": number, "id": str(number)}
            writer.add("train", number, line, _columns(number, n), values)
        writer.finish()
    return World(path, dictionary, decoders)


def _columns(sample: int, n: int) -> dict[str, npt.NDArray[Any]]:
    """Of one sample, alternately text and image."""
    return {
        "sample": np.full(n, sample),
        "position": np.arange(n),
        "token_id": np.zeros(n, int),
        "kind": (np.arange(n) % 2).astype(np.uint8),
        "row": np.full(n, -1),
        "col": np.full(n, -1),
    }
