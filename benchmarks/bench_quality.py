"""Held-out FVU at equal tokens: against dense autograd, and a CLT against per-layer transcoders.

    python benchmarks/bench_quality.py [CACHE] [--layers 8-13] [--tokens 30000] [--k 32]

All see the same tokens in the same order, with the same learning rates and seeds. The dense reference has
the same first weights, and its own forward pass, graph and Adam.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rival_steps import Leaves, dense_step

from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.optimizer import learning_rate
from clt.train.plan import plan
from clt.train.reader import Reader
from clt.train.transcoder import CrossLayerTranscoder, new_transcoder

DEMO = Path(__file__).parents[1] / "demo" / "out" / "shapes.cache"


class Score(NamedTuple):
    name: str
    latents: int
    parameters: int
    fvu: float
    """Summed over layers, on split val"""
    l0: float
    seconds: float

    def __str__(self) -> str:
        size = f"{self.latents} | {self.parameters / 1e6:.1f} M"
        return f"| {self.name} | {size} | {self.l0:.1f} | {self.fvu:.4f} | {self.seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--layers", default="8-13")
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion-factor", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clt = TrainConfig(
            caches=(asked.cache,),
            run=Path(folder) / "clt",
            transcoder=TranscoderConfig(k=asked.k, expansion_factor=asked.expansion_factor, n_targets=999),
            layers=asked.layers,
            tokens=asked.tokens,
            batch_tokens=512,
            epochs=99,
            lr=asked.lr,
            lr_warmup_steps=10,
            exclude=("bos", "sink"),
        )
        compare(clt)


def compare(clt: TrainConfig) -> None:
    """Print the table, a row as soon as it is known."""
    print(
        f"\n{clt.caches[0].name}, layers {clt.layers}, {clt.tokens} tokens, k {clt.transcoder.k}, "
        f"lr {clt.lr}, without {' and '.join(clt.exclude)}; {torch.get_num_threads()} threads\n\n"
        "| | latents of a layer | parameters | L0 | summed held-out FVU | seconds |\n"
        "|---|---|---|---|---|---|"
    )
    print(first := ours("CLT", clt), flush=True)
    print(reference(clt), flush=True)
    alone = replace(clt.transcoder, n_targets=1)
    print(ours("per-layer", replace(clt, run=clt.run.with_name("plt"), transcoder=alone)), flush=True)
    model = load_transcoder(clt.run)
    width, layers = model.shape.d_model, model.shape.n_layers
    alone = replace(alone, latents=round((first.parameters / layers - width) / (2 * width + 1)))
    wide = replace(clt, run=clt.run.with_name("wide"), transcoder=alone)
    print(ours("per-layer, parameters of the CLT", wide), flush=True)


def ours(name: str, config: TrainConfig) -> Score:
    began = time.monotonic()
    train(config)
    return score(name, config, load_transcoder(config.run), time.monotonic() - began)


def reference(config: TrainConfig) -> Score:
    """The same transcoder by dense activations, one autograd graph a step, and torch's Adam."""
    began, source = time.monotonic(), open_source(config, "train")
    model = new_transcoder(config.transcoder, source, torch.float32, config.seed)
    leaves, planned = Leaves(model), plan(config, source, model.shape.n_latents)
    with Reader(source, buffer_tokens=config.buffer_tokens, seed=config.read_seed) as reader:
        for step in range(planned.steps):
            left = planned.tokens - step * config.batch_tokens
            dense_step(leaves, reader.next(min(config.batch_tokens, left)))
            rate = learning_rate(step, planned.lr, planned.warmup, planned.steps, config.lr_schedule)
            leaves.adam.param_groups[0]["lr"] = rate
            leaves.update()
    return score("CLT, dense autograd", config, model, time.monotonic() - began)


def score(name: str, config: TrainConfig, model: CrossLayerTranscoder, seconds: float) -> Score:
    found, shape = evaluate(model, open_source(config, "val")), model.shape
    return Score(
        name, shape.n_latents, shape.n_parameters, float(found.fvu.sum()), float(found.l0.mean()), seconds
    )


if __name__ == "__main__":
    main()
