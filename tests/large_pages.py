"""Pages of a run of LLaVA's size with invented numbers, as `clt features` writes them; some latents."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clt.analysis.feature_pages import BLOCK, write_pages
from clt.analysis.latents import bin_edges
from clt.analysis.sample_pages import BLOCK as SAMPLE_BLOCK
from clt.analysis.sample_pages import write_data
from clt.cache_format.layout import KINDS

EXAMPLES, SIDE, TEXT = 26, 24, 44
"""Of each latent; patches across a picture; other tokens of a sample."""


class Large(NamedTuple):
    layer: int
    latent: int
    """Where the largest activation is, and the only block of latents that is there"""
    sample_files: set[str]
    """That its examples need"""


def write_large(folder: Path, layers: int = 32, latents: int = 8192, samples: int = 20_000) -> Large:
    rng = np.random.default_rng(0)
    folder.mkdir()
    largest = (0, 0, 0.0)
    for layer in range(layers):
        top = np.round(rng.exponential(size=latents), 4)
        if top.max() > largest[2]:
            largest = (layer, int(top.argmax()), float(top.max()))
        data = {
            "kinds": rng.integers(0, 10_000, (4, latents)).tolist(),
            "max": top.tolist(),
            "label": [[f"word{i % 997}", "other"] for i in range(latents)],
            "pictures": [0] * latents,
        }
        write_data(folder, f"list-{layer}", data)
    blocks = rng.choice(samples // SAMPLE_BLOCK, EXAMPLES, replace=False)
    block = [_latent(rng, blocks * SAMPLE_BLOCK, largest[2]) for _ in range(BLOCK)]
    write_data(folder, f"latents-{largest[0]}-{largest[1] // BLOCK}", block)
    for number in blocks.tolist():
        _write_samples(folder, number)
    about = {
        "run": "large",
        "model": "invented",
        "split": "train",
        "layers": list(range(layers)),
        "latents": latents,
        "bins": bin_edges(),
        "notes": [],
        "tokens": dict.fromkeys(KINDS, 10_000_000),
        "sample_blocks": list(range(0, samples, SAMPLE_BLOCK)),
    }
    write_pages(folder, about)
    return Large(*largest[:2], {f"samples-{number}.js" for number in blocks.tolist()})


def _latent(rng: np.random.Generator, samples: np.ndarray, largest: float) -> dict[str, object]:
    """Active on 60 tokens of each example."""
    examples = []
    for rank, sample in enumerate(samples.tolist()):
        places = np.sort(rng.choice(SIDE**2 + TEXT, 60, replace=False)).tolist()
        values = np.round(largest * rng.random(60), 4).tolist()
        examples.append([sample, places[int(np.argmax(values))], -1 if rank < 16 else 0.5, places, values])
    similar = [[int(n), 0.5, 0.25] for n in rng.integers(0, 8192, 8)]
    return {"histogram": [20, [9] * 12], "targets": [1.0] * 16, "similar": similar, "examples": examples}


def _write_samples(folder: Path, number: int) -> None:
    """A block of samples with a picture of SIDE x SIDE patches and TEXT tokens each."""
    edges = np.round(np.linspace(0, 100, SIDE + 1), 2).tolist()
    grid = [[edges[c], edges[r], edges[c + 1], edges[r + 1]] for r in range(SIDE) for c in range(SIDE)]
    (folder / "pictures").mkdir(exist_ok=True)
    colours = np.random.default_rng(number).integers(0, 256, (336, 336, 3), np.uint8)
    Image.fromarray(colours).save(folder / "pictures" / f"{number}.png")
    image = {"src": f"pictures/{number}.png", "w": 336, "h": 336, "tokens": list(range(SIDE**2)), "grid": 0}
    kinds = str(KINDS.index("image")) * SIDE**2 + str(KINDS.index("text")) * TEXT
    sample = {"k": kinds, "t": [" word"] * TEXT, "gaps": [], "images": [image]}
    first = number * SAMPLE_BLOCK
    samples = {str(first + n): {"id": f"sample {first + n}", **sample} for n in range(SAMPLE_BLOCK)}
    write_data(folder, f"samples-{number}", {"grids": [grid], "samples": samples})
