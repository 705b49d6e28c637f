"""How fast `clt features` goes through a cache, beside its reader alone and its encoder alone.

    python benchmarks/bench_features.py [--widths 576,4096] [--repeats 3] [--threads N]

One layer of random int8 codes (the same 8,192 tokens as often as CACHES says), of SmolLM2's and of
LLaVA-1.5's width, with 2 d_model latents and k 32. The encoder alone is its matrix product and top-k, on
floats that lie in memory: no pass can be faster here. Rounds alternate between the three, so that a busy
machine slows all alike; shown are medians, and the median of each round's ratio to the encoder. Then comes
what the pass does beside it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from step_reader import STORED, write_cache
from synthetic_step import SHAPES

from clt.analysis.code_file import CodeFile
from clt.analysis.directions import load_encoder
from clt.analysis.features import write_features
from clt.analysis.features_config import FeaturesConfig
from clt.analysis.latents import LatentStatistics, Sizes
from clt.analysis.layer_reader import SITE, LayerReader
from clt.train.checkpoint import checkpoint_folder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import train
from clt.train.shape import Shape
from clt.train.source import Source
from clt.train.transcoder import CrossLayerTranscoder

BATCH = 4096
CACHES = {576: 16, 4096: 2}
"""Read as one, by width: the first batches cost more, for all that they hold are the strongest so far."""
CPU = torch.device("cpu")


class Setting(NamedTuple):
    folder: Path
    run: Path
    source: Source
    model: CrossLayerTranscoder
    threads: int

    def reader(self) -> LayerReader:
        return LayerReader(self.source, 0, BATCH, self.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default=",".join(map(str, SHAPES)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for width in map(int, asked.widths.split(",")):
        shape = replace(SHAPES[width], layers=(0,), n_targets=1)
        with tempfile.TemporaryDirectory() as folder:
            compare(prepare(Path(folder), shape, asked.threads), shape, asked.repeats)


def prepare(folder: Path, shape: Shape, threads: int) -> Setting:
    """A cache, and a run that took one step on it."""
    caches = tuple(folder / f"cache-{number}" for number in range(CACHES[shape.d_model]))
    write_cache(caches[0], shape)
    for other in caches[1:]:
        shutil.copytree(caches[0], other)
    structure = TranscoderConfig(k=int(shape.layer_k[0]), latents=shape.n_latents, n_targets=1)
    options = {"optimizer": "signum", "batch_tokens": 64, "buffer_tokens": 64, "steps": 1}
    with quiet():
        train(TrainConfig(caches=caches, run=folder / "run", transcoder=structure, **options))
    model = load_encoder(checkpoint_folder(folder / "run"), 0)
    return Setting(folder, folder / "run", Source(caches, "train"), model, threads)


def compare(setting: Setting, shape: Shape, repeats: int) -> None:
    sizes = f"d_model {shape.d_model}, {shape.n_latents} latents, {setting.source.n_tokens} tokens"
    print(f"\nOne layer, {sizes}, {setting.threads} threads")
    ways: dict[str, Callable[[], float]] = {
        "the encoder alone": lambda: encode(setting),
        "the reader alone": lambda: read(setting),
        "the pass": lambda: features(setting)[0],
    }
    for way in ways.values():
        way()  # pages of files, and threads
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(way())
    print("\n| | tokens/s of one layer | over the encoder's |\n|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["the encoder alone"], strict=True))
        print(f"| {name} | {statistics.median(found):.0f} | {ratio:.2f} |")
    _, waiting, whole = features(setting)
    print(f"\nThe pass waits for the reader for {waiting:.1%} of its time. With the pages, which cost a")
    print(f"fixed amount a latent, the command takes {whole:.1f} s. What the pass does with its time:\n")
    seconds = parts(setting)
    print(", ".join(f"{name} {s / sum(seconds.values()):.1%}" for name, s in seconds.items()), flush=True)


@torch.no_grad()
def encode(setting: Setting) -> float:
    """Tokens/s of the product and the activation."""
    _, batch = next(setting.reader().batches())
    values = setting.model.inputs.apply_to(batch.values(SITE, 0, CPU, torch.float32), 0)
    began = time.perf_counter()
    for _ in range(2 * STORED // BATCH):
        setting.model.encode_layer(values, 0)
    return 2 * STORED / (time.perf_counter() - began)


def read(setting: Setting) -> float:
    """Tokens/s that the pass's reader delivers to nobody."""
    began = time.perf_counter()
    tokens = sum(len(batch) for _, batch in setting.reader().batches())
    return tokens / (time.perf_counter() - began)


def features(setting: Setting) -> tuple[float, float, float]:
    """Tokens/s of the pass as the command tells them, its share of waiting, and the command's seconds."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as out, quiet():
        config = FeaturesConfig(run=setting.run, out=Path(out) / "pages", threads=setting.threads)
        began = time.perf_counter()
        report = write_features(config)
        return report.tokens_per_s or 0.0, report.waiting or 0.0, time.perf_counter() - began


@torch.no_grad()
def parts(setting: Setting) -> dict[str, float]:
    """Seconds of what the pass does with a batch, by what it is."""
    columns = (torch.from_numpy(setting.source.sample), torch.from_numpy(setting.source.kind))
    counts = LatentStatistics(setting.model.shape.n_latents, *columns, Sizes())
    spent = dict.fromkeys(
        ("numbers to floats", "product", "top-k", "counts and examples", "scratch file"), 0.0
    )
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        codes = CodeFile(Path(scratch) / "codes")
        for _, batch in setting.reader().batches():
            marks: list[float] = []

            def mark(marks: list[float] = marks) -> None:
                marks.append(time.perf_counter())

            mark()
            values = setting.model.inputs.apply_to(batch.values(SITE, 0, CPU, torch.float32), 0)
            mark()
            pre = setting.model.pre_activations(values, 0)
            mark()
            found = setting.model.activation(0).infer(pre)
            mark()
            counts.add(found, torch.from_numpy(batch.token))
            mark()
            codes.add(found)
            mark()
            for name, before, after in zip(spent, marks[:-1], marks[1:], strict=True):
                spent[name] += after - before
    return spent


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


if __name__ == "__main__":
    main()
