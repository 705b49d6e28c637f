"""A cache whose samples have a topic each, in the order of topics: what shuffling is there for."""

from pathlib import Path

import numpy as np

from clt.cache_format import CacheWriter, Manifest

LAYERS, WIDTH, TOPICS, FEATURES, SAMPLE, SAMPLES = 2, 24, 16, 4, 64, 12


def write_topics(path: Path) -> Path:
    """SAMPLES samples a topic; a topic's tokens are sparse codes of its own FEATURES features.

    A window is 6 samples of one topic. Split val has two samples of every topic.
    """
    rng = np.random.default_rng(7)
    dictionary, decoder = rng.standard_normal((2, TOPICS, FEATURES, LAYERS, WIDTH))
    manifest = Manifest(
        d_model=WIDTH,
        layers=(0, 1),
        precision="bf16",
        step_divisor=0.0,
        window=6 * SAMPLE,
        seed=0,
        world_size=1,
        source={"model": "topics"},
    )
    with CacheWriter(path, manifest, threads=1) as writer:
        for split, samples in (("train", SAMPLES), ("val", 2)):
            for sample in range(TOPICS * samples):
                topic, n = sample // samples, sample + (10**6 if split == "val" else 0)
                codes = rng.exponential(size=(SAMPLE, FEATURES)) * (rng.random((SAMPLE, FEATURES)) < 0.4)
                columns = {name: np.zeros(SAMPLE, int) for name in ("token_id", "kind", "row", "col")}
                columns |= {"sample": np.full(SAMPLE, n), "position": np.arange(SAMPLE)}
                values = {
                    site: np.einsum("tf,fld->tld", codes, part[topic]).astype(np.float32)
                    for site, part in (("mlp_in", dictionary), ("mlp_out", decoder))
                }
                writer.add(split, sample, {"sample": n, "id": str(n)}, columns, values)
        writer.finish()
    return path
