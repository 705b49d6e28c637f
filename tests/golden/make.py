"""How the golden caches of version 1 were made; they are never made again.

    python tests/golden/make.py FOLDER NAME

writes the cache NAME (`int8`, whose blocks are of 64 channels, `int8-32`, or `bf16`), an `.npz` and a `.json`
of what a reader must find. Expected values come from what was put in, rounded here by the rules of FORMAT.md
in plain numpy, not from a reader.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clt.cache_format import CacheWriter, Manifest, open_cache
from clt.cache_format.layout import SITES, SPLITS, TOKEN_COLUMNS

Array = npt.NDArray[Any]
WIDTH = {"int8": 66, "bf16": 8}
"""Channels; int8 has whole blocks of scales and one of two channels."""
LAYERS = (1, 4)
TRAIN, VAL = (20, 41, 30), (9,)
"""Tokens of each sample: windows of 64 cut split train inside a sample; the last window is partial."""


def main(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    precision, _, block = name.partition("-")
    samples = make_samples(precision)
    write(folder / name, precision, int(block or 64), 2 if precision == "bf16" else 1, samples)
    expect(folder / name, precision, int(block or 64), samples)


def make_samples(precision: str) -> list[dict[str, Any]]:
    """Values of few bits, so that the files stay small, with a sink and, in bf16, what is not finite."""
    rng = np.random.default_rng(1)
    samples = []
    for number, length in enumerate(TRAIN + VAL):
        values = {
            site: (rng.integers(-2, 3, (length, len(LAYERS), WIDTH[precision])) * 0.37).astype(np.float32)
            for site in SITES
        }
        values["mlp_out"][0, :, 3] = 4321.0
        if precision == "bf16" and number == len(TRAIN):
            odd = np.array(
                [0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0x00010000], np.uint32
            )
            values["mlp_in"][2, 1, :6] = odd.view(np.float32)
        columns = {
            "sample": np.full(length, number, np.int32),
            "position": np.arange(length, dtype=np.int32),
            "token_id": rng.integers(0, 50_000, length).astype(np.int32),
            "kind": (np.arange(length) % 4).astype(np.uint8),
            "row": (np.arange(length) % 3 - 1).astype(np.int16),
            "col": (np.arange(length) % 5 - 1).astype(np.int16),
        }
        samples.append(
            {"split": "val" if number >= len(TRAIN) else "train", "columns": columns, "values": values}
        )
    return samples


def write(path: Path, precision: str, block: int, world_size: int, samples: list[dict[str, Any]]) -> None:
    manifest = Manifest(
        d_model=WIDTH[precision],
        layers=LAYERS,
        precision=precision,
        step_divisor=8.0 if precision == "int8" else 0.0,
        window=64,
        block=block,
        seed=5,
        world_size=world_size,
        source={"model": "golden", "dataset": "golden é", "tokens": None, "val_fraction": 0.25},
    )
    for rank in range(world_size):
        with CacheWriter(path, manifest, rank=rank, threads=1) as writer:
            for place, sample in list(enumerate(samples))[rank::world_size]:
                line = {
                    "sample": place,
                    "id": f"golden-{place} é",
                    "tokens": len(sample["columns"]["sample"]),
                }
                writer.add(sample["split"], place, line, sample["columns"], sample["values"])
            if rank == 0:
                writer.reject(99, {"sample": 99, "id": "golden-99", "reason": "no text"})
            writer.finish()


def expect(path: Path, precision: str, block: int, samples: list[dict[str, Any]]) -> None:
    cache = open_cache(path)
    arrays: dict[str, Array] = {}
    for name in SPLITS:
        split = cache[name]
        table = split.tokens()
        arrays |= {f"{name}/token/{column}": table[column] for column in TOKEN_COLUMNS}
        for site in SITES:
            rows = [
                samples[s]["values"][site][p] for s, p in zip(table["sample"], table["position"], strict=True)
            ]
            true = np.stack(rows)
            arrays[f"{name}/{site}"] = (
                rounded_int8(true, block) if precision == "int8" else rounded_bf16(true)
            )
            for statistic in ("mean", "variance", "rms", "absmax", "noise_fvu"):
                arrays[f"{name}/{site}/{statistic}"] = getattr(split.statistics(site), statistic)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    facts = {
        "manifest": json.loads((path / "zarr.json").read_text())["attributes"]["clt"],
        "complete": cache.complete,
        "tokens": {name: len(cache[name]) for name in SPLITS},
        "windows": {name: [[e.window, e.tokens] for e in cache[name].entries] for name in SPLITS},
        "kinds": {name: cache[name].counts() for name in SPLITS},
        "sinks": {name: cache[name].n_sinks for name in SPLITS},
        "samples": list(cache.samples().values()),
        "rejected": cache.rejected(),
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def rounded_int8(values: Array, width: int) -> Array:
    """Code times scale for (token, layer, channel), one vector and block at a time."""
    out = np.empty_like(values)
    for at in np.ndindex(values.shape[:2]):
        x = values[at]
        for start in range(0, len(x), width):
            block = x[start : start + width]
            typical = np.float32(np.sqrt(np.pi / 2) / 8) * np.abs(x).mean()
            step = max(typical, np.abs(block).max() / np.float32(127))
            scale = np.float16(step)
            scale = np.nextafter(scale, np.float16(np.inf)) if scale < step else scale
            code = np.rint(block / np.float32(scale)).astype(np.int8)
            out[at][start : start + width] = code * np.float32(scale)
    return out


def rounded_bf16(values: Array) -> Array:
    bits = values.view(np.uint32).astype(np.uint64)
    near = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    cut = bits >> 16
    near = np.where(np.isnan(values), np.where(cut & 0x7F, cut, cut | 0x40), near)
    return (near << 16).astype(np.uint32).view(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
