"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from object_store import QUICK, Proxy, s3_server, spoiling_proxy

from clt.cache_format import CacheWriter, Manifest, Split
from clt.cache_format.bf16 import from_bf16_bits, to_bf16_bits
from clt.cache_format.int8 import dequantise, quantise
from clt.cache_format.layout import SITES

settings.register_profile("clt", max_examples=50, deadline=None)  # a slow machine is no failure
settings.load_profile("clt")

LENGTHS = (37, 90, 5, 64, 1, 100, 20, 70, 33, 15, 60, 2)
REJECTED = 3


@dataclass(frozen=True)
class TinySample:
    number: int
    split: str
    columns: dict[str, npt.NDArray[Any]]
    values: dict[str, npt.NDArray[np.float32]]
    """site -> (token, layer, d_model)"""

    @property
    def line(self) -> dict[str, Any]:
        return {"sample": self.number, "id": f"id-{self.number} é", "tokens": len(self.columns["sample"])}


@dataclass
class TinyCache:
    """A cache as it was meant to be: where it is, and what every token's values were before storing."""

    path: Path
    manifest: Manifest
    samples: list[TinySample]
    threads: int = 2
    true: dict[tuple[str, int, int], dict[str, npt.NDArray[np.float32]]] = field(default_factory=dict)
    """(split, sample, position) -> site -> (layer, d_model)"""

    def __post_init__(self) -> None:
        for sample in self.samples:
            for position in range(len(sample.columns["sample"])):
                at = {site: sample.values[site][position] for site in SITES}
                self.true[sample.split, sample.number, position] = at

    def at(self, path: Path) -> "TinyCache":
        """The same content for another folder."""
        return TinyCache(path, self.manifest, self.samples, self.threads)

    def writer(self, rank: int = 0) -> CacheWriter:
        return CacheWriter(self.path, self.manifest, rank=rank, threads=self.threads)

    def feed(self, writer: CacheWriter, rank: int = 0, stop: int | None = None) -> None:
        """Deliver this rank's samples from the writer's cursors on, as a harvest does."""
        mine = self.samples[rank :: self.manifest.world_size][:stop]
        begin = {split: writer.cursor(split) for split in ("train", "val")}
        for place, sample in enumerate(mine):
            if sample.number == REJECTED:
                writer.reject(sample.number, {"sample": sample.number, "reason": "too long"})
            elif place >= begin[sample.split]:
                writer.add(sample.split, place, sample.line, sample.columns, sample.values)

    def write(self, rank: int = 0) -> None:
        """Write, or finish writing, one rank's part."""
        with self.writer(rank) as writer:
            self.feed(writer, rank)
            writer.finish()

    def stored(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What a lossless reader gives for `values` (token, d_model)."""
        if self.manifest.precision == "int8":
            return dequantise(*quantise(values, self.manifest.step_divisor, self.manifest.block))
        return from_bf16_bits(to_bf16_bits(values))

    def expected(self, split: Split, site: str) -> npt.NDArray[np.float32]:
        """(token, layer, d_model) of a split in the order on disk, found by sample and position."""
        sample, position = split.token_column("sample").tolist(), split.token_column("position").tolist()
        true = [self.true[split.name, s, p][site] for s, p in zip(sample, position, strict=True)]
        shape = (len(true), self.manifest.n_layers, self.manifest.d_model)
        rows = np.array(true, np.float32).reshape(-1, self.manifest.d_model)
        return self.stored(rows).reshape(shape) if len(rows) else rows.reshape(shape)

    def planned(self, split: str) -> set[tuple[int, int]]:
        """(sample, position) of every token that the split must hold."""
        return {(s, p) for name, s, p in self.true if name == split and s != REJECTED}

    def files(self) -> dict[str, bytes]:
        """Every file of the folder with its bytes."""
        found = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)): path.read_bytes() for path in found}


def _samples(manifest: Manifest, lengths: tuple[int, ...]) -> Iterator[TinySample]:
    rng = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        values = {}
        for site in SITES:
            shape = (length, manifest.n_layers, manifest.d_model)
            values[site] = rng.standard_normal(shape, np.float32) * np.float32(1 + number)
        values["mlp_out"][0, :, 3] = 9000.0  # a sink
        columns = {
            "sample": np.full(length, number, np.int32),
            "position": np.arange(length, dtype=np.int32),
            "token_id": rng.integers(0, 50_000, length).astype(np.int32),
            "kind": (np.arange(length) % 4).astype(np.uint8),
            "row": np.full(length, -1, np.int16),
            "col": np.arange(length, dtype=np.int16),
        }
        yield TinySample(number, "val" if number % 3 == 2 else "train", columns, values)


@pytest.fixture
def plan_cache(tmp_path: Path) -> Callable[..., TinyCache]:
    """plan_cache(name="cache", **manifest fields): a tiny cache that is not written yet.

    By default: 3 layers, 80 channels (so the last block of scales is narrower), windows of 128 tokens, 3 in
    train and 2 in val with a partial one at the end of each, samples that span windows, one that is rejected.
    """

    def plan(
        name: str = "cache", *, lengths: tuple[int, ...] = LENGTHS, threads: int = 2, **options: Any
    ) -> TinyCache:
        precision = options.get("precision", "int8")
        default = {
            "d_model": 80,
            "layers": (0, 2, 5),
            "precision": precision,
            "step_divisor": 8.0 if precision == "int8" else 0.0,
            "window": 128,
            "seed": 7,
            "world_size": 1,
            "source": {"model": "tiny", "tokens": None},
        }
        manifest = Manifest(**(default | options))
        return TinyCache(tmp_path / name, manifest, list(_samples(manifest, lengths)), threads)

    return plan


@pytest.fixture
def make_cache(plan_cache: Callable[..., TinyCache]) -> Callable[..., TinyCache]:
    """make_cache(name="cache", **manifest fields): a tiny complete cache on disk; see `plan_cache`."""

    def make(name: str = "cache", **options: Any) -> TinyCache:
        tiny = plan_cache(name, **options)
        for rank in range(tiny.manifest.world_size):
            tiny.write(rank)
        return tiny

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, for pages; where there is none, what needs it is skipped."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine; install one to look at pages in a browser")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses a sandbox to root
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server."""
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before that server; who asks through it waits but a moment before trying again."""
    monkeypatch.setattr("clt.remote.store.Store.__init__.__defaults__", (QUICK,))
    with spoiling_proxy(server, monkeypatch) as proxy:
        yield proxy
