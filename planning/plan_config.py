"""What is planned: a model's sizes, a transcoder, how it is trained and read, and what a cache shows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cache_format import open_cache
from ..cache_format.layout import CHUNK, n_chunks, parse_layers
from ..cache_format.manifest import PRECISIONS
from ..remote.address import remote_address
from ..train.config import DTYPES, OPTIMIZERS, WITH_K, TranscoderConfig
from ..train.order import ReadOrder
from ..train.shape import Shape
from ..train.source import Source
from .cache_size import TYPICAL, CacheSize, Coded, measure_coded
from .model_size import ModelSize, read_model_size
from .rank_cost import Work

READ_SPEEDS = (0.2, 1.0, 5.0)
"""GB/s: a network drive, a good network file system, a local NVMe drive."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned."""

    model: str
    size: ModelSize
    stored: tuple[int, ...]
    """Layers in the cache"""
    layers: tuple[int, ...]
    """Layers that are trained"""
    transcoder: TranscoderConfig
    l0: int | None = None
    """Active latents of a token and layer, assumed, of an activation without k; None: every latent"""
    tokens: int | None = None
    """Of split train; None: bytes are told by token only"""
    tokens_per_s: float | None = None
    """Of the harvest"""
    window: int = 16384
    step_divisor: float = 8.0
    sample_tokens: float = 1024.0
    """Tokens of a sample, the mean over tokens"""
    precision: str = "int8"
    """Of the cache that is trained from"""
    coded: Coded | None = None
    """Measured in a cache; None: TYPICAL"""
    measured_on: str = "measured on the demo's cache"
    batch_tokens: int = 4096
    grad_acc_steps: int = 1
    epochs: float = 1.0
    dtype: str = "float32"
    optimizer: str | None = None
    """None: all"""
    buffer_tokens: int = 8192
    shuffle_windows: int | None = None
    """None: all"""
    threads: int = 16
    ranks: int = 1
    read_speeds: tuple[float, ...] = READ_SPEEDS

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision: expected one of {PRECISIONS}, found {self.precision!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {DTYPES}, found {self.dtype!r}")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer: expected one of {OPTIMIZERS}, found {self.optimizer!r}")
        if self.l0 is not None and self.transcoder.activation in WITH_K:
            raise ValueError(f"--l0: {self.transcoder.activation} has --k; leave --l0 out")
        if self.l0 is not None and not 1 <= self.l0 <= self.shape.n_latents:
            raise ValueError(
                f"--l0: expected 1 to the {self.shape.n_latents} latents of a layer, found {self.l0}"
            )
        if self.window < 64 or self.window % 64:
            raise ValueError(f"--window: expected a multiple of 64, found {self.window}")
        counts = (
            "tokens",
            "batch_tokens",
            "grad_acc_steps",
            "buffer_tokens",
            "threads",
            "shuffle_windows",
            "ranks",
        )
        for name in (*counts, "tokens_per_s", "sample_tokens", "epochs", "step_divisor"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, found {value}")
        if any(speed <= 0 for speed in self.read_speeds):
            raise ValueError(f"--read-speeds: expected GB/s above 0, found {self.read_speeds}")

    @property
    def shape(self) -> Shape:
        """Of an activation without k, with as many codes as are assumed."""
        shape = Shape.of(self.transcoder, self.layers, self.size.d_model)
        return shape if shape.layer_k else replace(shape, k=self.l0 or shape.n_latents)

    def cache_size(self, precision: str) -> CacheSize:
        return CacheSize(len(self.stored), self.size.d_model, precision, self.step_divisor, self.window)

    def coded_as(self, precision: str) -> Coded:
        return self.coded if self.coded and precision == self.precision else TYPICAL[precision]


def plan_of(
    model: str,
    cache: Path | None,
    layers: str | None,
    transcoder: TranscoderConfig,
    settings: dict[str, Any],
) -> PlanConfig:
    """The plan for a model; what a cache of it shows goes before `settings`."""
    size = read_model_size(model)
    held = tuple(range(size.n_layers))
    if cache is not None:
        if address := remote_address(cache):
            raise ValueError(
                f"--cache: expected a folder, found {address}; `clt pull {address} FOLDER --windows 1` "
                "brings enough of it"
            )
        opened = open_cache(cache, check=False)
        manifest = opened.manifest
        if manifest.d_model != size.d_model:
            raise ValueError(
                f"{cache} has {manifest.d_model} channels, {model} has {size.d_model}; "
                "name the model that it was harvested from"
            )
        train, held = Source([cache], "train"), manifest.layers
        settings = settings | {
            "coded": measure_coded(opened),
            "measured_on": f"measured on {cache}",
            "precision": manifest.precision,
            "step_divisor": manifest.step_divisor or settings["step_divisor"],
            "window": manifest.window,
            "sample_tokens": train.tokens_per_sample,
            "tokens": settings["tokens"] or train.n_tokens,
        }
    chosen = parse_layers(layers, held)
    return PlanConfig(model=model, size=size, stored=held, layers=chosen, transcoder=transcoder, **settings)


def work_of(config: PlanConfig, optimizer: str, offload: str = "none") -> Work:
    """The trainer's and reader's sizes; a short cache has smaller buffers."""
    chunks = n_chunks(config.tokens or config.buffer_tokens)
    buffer = ReadOrder(chunks, config.buffer_tokens, seed=0).largest_buffer * CHUNK
    return Work(
        config.shape,
        config.batch_tokens,
        config.grad_acc_steps,
        config.dtype,
        optimizer,
        offload,
        buffer,
        config.precision,
        config.threads,
    )
