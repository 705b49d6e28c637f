"""A step's time as `clt plan`'s formulas predict it from rates measured here, beside the time that it takes.

    python benchmarks/predict_step.py [--steps 6]

Rates come first, each by itself: dense products of an encoder's size, passes over dense values with the
selection of their largest, rows of a matrix added up by index, weights through the optimiser, and the reader.
They are put into planning/rank_cost.py in place of a data sheet's. Then the same transcoder is trained. All
times are the processor's, with one thread, so that others on the machine count less and nothing hides
reading: the parts are added up.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from os import devnull
from pathlib import Path
from typing import NamedTuple

import step_reader
import torch
from torch.nn import functional

from clt.planning.cache_size import CacheSize
from clt.planning.rank_cost import PASSES, Machine, StepTime, Work, step_time
from clt.train.adam import Adam, slabs
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import Loop, train
from clt.train.ranks import Mesh
from clt.train.reader import Reader
from clt.train.shape import Shape
from clt.train.source import Source

TOKENS = 2048
SHAPES = (
    Shape(tuple(range(8)), d_model=576, n_latents=1152, k=32, n_targets=8),
    Shape(tuple(range(8)), d_model=576, n_latents=4608, k=32, n_targets=2),
    Shape(tuple(range(4)), d_model=2048, n_latents=4096, k=32, n_targets=4),
)


class Rates(NamedTuple):
    """A second: operations, bytes, bytes, bytes, tokens of the reader."""

    flops: float
    passes: float
    rows: float
    update: float
    tokens: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = ["layers x channels", "latents", "targets", "encode", "sparse", "update", "read and decode"]
    print(f"{TOKENS} tokens a step, k 32, float32, adam; the processor's seconds\n")
    print(f"| {' | '.join([*names, 'predicted', 'measured', 'predicted / measured'])} |")
    print("|" + "---|" * (len(names) + 3))
    for shape in SHAPES:
        print(_row(shape, asked.steps), flush=True)


def _row(shape: Shape, steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        step_reader.write_cache(cache, shape)
        expected = predicted(shape, measure_rates(shape, cache))
        measured = step_seconds(shape, cache, Path(folder) / "run", steps)
    parts = (expected.encode, expected.sparse, expected.update, expected.decode)
    total = expected.total(hidden=0.0)
    cells = [f"{shape.n_layers} x {shape.d_model}", shape.n_latents, shape.n_targets]
    cells += [f"{part:.3f}" for part in (*parts, total, measured)]
    return f"| {' | '.join(map(str, cells))} | {total / measured:.2f} |"


def predicted(shape: Shape, rates: Rates) -> StepTime:
    """By the formulas, each kind of memory at its own rate: a processor's caches hold rows, but no values."""
    work = Work(shape, TOKENS, 1, "float32", "adam", buffer_tokens=TOKENS)
    decode = rates.tokens * 2 * shape.n_layers * shape.d_model
    mesh, cache = Mesh.of(shape, 1, 0), CacheSize(shape.n_layers, shape.d_model)
    machine = Machine(0, rates.rows, rates.flops, 1e30, 1e30, disk=1e30, decode=decode)

    def at(bandwidth: float) -> StepTime:
        return step_time(work, mesh, machine._replace(bandwidth=bandwidth), cache)

    return at(rates.rows)._replace(encode=at(rates.passes).encode, update=at(rates.update).update)


def measure_rates(shape: Shape, cache: Path) -> Rates:
    x, weight = torch.randn(TOKENS, shape.d_model), torch.randn(shape.n_latents, shape.d_model)
    index = torch.randint(shape.n_latents, (TOKENS, 32))
    rows = TOKENS * 32 * shape.d_model * 4
    adam, grad = Adam(), torch.randn_like(weight)
    state = adam.new_state(weight)

    pre, codes = x @ weight.T, torch.randint(-9, 9, x.shape, dtype=torch.int8)

    def pass_over() -> None:
        """The largest of the pre-activations, and the values of two sites as they are made and used."""
        pre.topk(32)
        for _ in range(2):
            (codes.float() - 0.5).mul_(2.0).square().sum()

    def update() -> None:
        for piece in slabs(weight, grad, state):
            adam.update(*piece, lr=1e-4, step=1)

    return Rates(
        flops=2 * weight.numel() * TOKENS / seconds(lambda: x @ weight.T),
        passes=4 * TOKENS * (PASSES[0] * shape.n_latents + PASSES[1] * shape.d_model) / seconds(pass_over),
        rows=rows / seconds(lambda: functional.embedding_bag(index, weight, mode="sum")),
        update=weight.numel() * 2 * (4 + 8 + 4) / seconds(update),
        tokens=reader_rate(cache),
    )


def reader_rate(cache: Path) -> float:
    """Tokens/s of batches that nobody waits with."""
    with Reader(Source((cache,), "train"), buffer_tokens=TOKENS, seed=0, threads=1) as reader:
        return TOKENS / seconds(lambda: reader.next(TOKENS))


def seconds(act: Callable[[], object], repeats: int = 7) -> float:
    """Median of some calls, the first left out."""
    found = []
    for _ in range(repeats + 1):
        began = time.process_time()
        act()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def step_seconds(shape: Shape, cache: Path, run: Path, steps: int) -> float:
    """Of a step of `clt train`, reading included; the first two, in which memory is taken, are left out."""
    transcoder = TranscoderConfig(latents=shape.n_latents, k=32, n_targets=shape.n_targets)
    options = {"batch_tokens": TOKENS, "buffer_tokens": TOKENS, "threads": 1, "steps": steps, "epochs": 99}
    config = TrainConfig(caches=(cache,), run=run, transcoder=transcoder, **options)  # type: ignore[arg-type]
    found, take_step = [], Loop.take_step

    def timed(loop: Loop) -> None:
        began = time.process_time()
        take_step(loop)
        found.append(time.process_time() - began)

    Loop.take_step = timed  # type: ignore[method-assign]
    with open(devnull, "w") as nowhere, redirect_stderr(nowhere):
        train(config)
    Loop.take_step = take_step  # type: ignore[method-assign]
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
