"""What `clt plan` says: bytes, memory and time, each with its value and the formula that gave it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cache_format import open_cache
from ..cache_format.layout import CHUNK, SITES, n_chunks, parse_layers
from ..cache_format.manifest import PRECISIONS
from ..train.config import DTYPES, OPTIMIZERS, TranscoderConfig
from ..train.memory import BYTES
from ..train.order import ReadOrder, perfect_partners, predicted_partners
from ..train.ranks import Mesh, wire_bytes
from ..train.shape import Shape
from ..train.source import Source
from .cache_size import TYPICAL, CacheSize, Coded, cache_bytes, layer_bytes, measure_coded
from .model_size import ModelSize, read_model_size
from .rank_cost import RankMemory, Work, rank_memory

READ_SPEEDS = (0.2, 1.0, 5.0)
"""GB/s: a network drive, a good network file system, a local NVMe drive."""
PROCESS_BYTES = 280 * 2**20
"""Python with torch and what `clt train` imports, 230 MiB with the CPU build of torch 2.13, and what its
libraries take in the first step."""


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
        return Shape.of(self.transcoder, self.layers, self.size.d_model)

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


class Line(NamedTuple):
    section: str
    key: str
    value: Any
    """For --json"""
    text: str
    formula: str


def predict(config: PlanConfig) -> list[Line]:
    """All lines, in the order of the pipeline."""
    return [*_cache_lines(config), *_harvest_lines(config), *_memory_lines(config), *_reading_lines(config)]


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


def _cache_lines(config: PlanConfig) -> list[Line]:
    lines, width, layers = [], config.size.d_model, len(config.stored)
    raw = len(SITES) * layers * width * 2
    lines.append(
        Line(
            "cache",
            "uncompressed_bytes_per_token",
            raw,
            f"{_size(raw)} a token uncompressed",
            f"2 sites * {layers} layers * {width} channels * 2 bytes",
        )
    )
    for precision in PRECISIONS:
        size, coded = config.cache_size(precision), config.coded_as(precision)
        parts = cache_bytes(size, config.tokens or config.window, coded)
        per_token = parts.total / (config.tokens or config.window)
        bits = 8 * per_token * 2 / raw
        ours = config.measured_on if precision == config.precision else "measured on the demo's caches"
        formula = (
            f"codes 2 * {layers} * {width} * {coded.code_bits:.3f} bits ({ours}) "
            + (f"+ log2(step divisor {config.step_divisor:g} / 8), " if precision == "int8" else "")
            + f"scales {coded.scale_bits:.2f} bits a block of 64, indexes 16 bytes a chunk, token table and "
            f"statistics; {_parts(parts._asdict())}"
        )
        text = f"{_size(per_token)} a token, {bits:.2f} bits a value"
        lines.append(Line("cache", f"{precision}_bytes_per_token", per_token, text, formula))
        if config.tokens:
            whole = f"bytes a token * {config.tokens} tokens"
            lines.append(
                Line("cache", f"{precision}_bytes", parts.total, f"{_size(parts.total)} in all", whole)
            )
    return lines


def _harvest_lines(config: PlanConfig) -> list[Line]:
    if config.tokens_per_s is None:
        return []
    size = config.cache_size(config.precision)
    per_token = cache_bytes(size, config.window, config.coded_as(config.precision)).total / config.window
    rate = config.tokens_per_s * per_token
    written = Line(
        "harvest",
        "bytes_per_s",
        rate,
        f"{_size(rate)}/s written",
        f"{config.tokens_per_s:g} tokens/s * {per_token:.0f} bytes a token ({config.precision})",
    )
    if config.tokens is None:
        return [written]
    hours = config.tokens / config.tokens_per_s / 3600
    formula = f"{config.tokens} tokens / {config.tokens_per_s:g} tokens/s"
    return [Line("harvest", "hours", hours, _hours(hours), formula), written]


def _memory_lines(config: PlanConfig) -> list[Line]:
    shape = config.shape
    decoders = shape.n_decoders * shape.n_latents * shape.d_model
    lines = [
        Line(
            "training",
            "parameters",
            shape.n_parameters,
            f"{_count(shape.n_parameters)} parameters, {_count(decoders)} in {shape.n_decoders} decoders",
            f"({shape.n_layers} encoders + {shape.n_decoders} decoders) * {shape.n_latents} latents * "
            f"{shape.d_model} channels, and biases; {shape.n_pairs} (source, target) pairs",
        )
    ]
    meshes = Mesh.of(shape, config.ranks, 0).everyone
    for optimizer in (config.optimizer,) if config.optimizer else OPTIMIZERS:
        if optimizer == "adam8" and config.dtype == "float64":
            continue
        for offload in ("none", "host") if config.ranks == 1 else ("none",):
            work = work_of(config, optimizer, offload)
            ranks = [rank_memory(work, mesh) for mesh in meshes]
            lines.append(_memory_line(config, work, max(ranks, key=lambda memory: memory.step.device)))
    if config.ranks > 1:
        lines.append(_wire_line(config, meshes))
    return lines


def _memory_line(config: PlanConfig, work: Work, held: RankMemory) -> Line:
    """Decoders on the device, or away from it."""
    step, away, reading = held
    host = held.host + PROCESS_BYTES
    on_device = _parts({name: part for name, part in step._asdict().items() if name != "batches"})
    decoders = f"decoders and their state {_size(away)} (with disk: there) + " if away else ""
    of_rank = f"; the heaviest of {config.ranks} ranks" if config.ranks > 1 else ""
    return Line(
        "training",
        f"memory_{work.optimizer}{'_offload' if away else ''}",
        {"device": step.device, "host": host, "one_machine": step.device + host},
        f"{'  --offload host: ' if away else f'{work.optimizer:<7} '}device {_size(step.device)}, host "
        f"{_size(host)}; {_size(step.device + host)} where both are one{of_rank}",
        f"device: {on_device}; host: {decoders}batches {_size(step.batches)} + "
        f"{_parts(reading._asdict())} + Python and torch {_size(PROCESS_BYTES)}; train/memory.py, "
        f"{config.dtype}",
    )


def _wire_line(config: PlanConfig, meshes: tuple[Mesh, ...]) -> Line:
    tokens = config.batch_tokens * config.grad_acc_steps
    sent = [wire_bytes(config.shape, m, tokens, weight=BYTES[config.dtype]) for m in meshes]
    most = max(sent, key=lambda wire: wire.total)
    parts = _parts({name: round(size / tokens) for name, size in most._asdict().items()})
    return Line(
        "training",
        "wire_bytes_per_token",
        most.total / tokens,
        f"{_size(most.total / tokens)} a token sent by the rank that sends most ({meshes[0].shards} shards, "
        f"{meshes[0].replicas} replicas)",
        f"train/ranks.py, wire_bytes: {parts}",
    )


def _reading_lines(config: PlanConfig) -> list[Line]:
    lines, n_layers = [], len(config.layers)
    tokens = config.tokens or config.window
    size = config.cache_size(config.precision)
    epoch = n_layers * layer_bytes(size, tokens, config.coded_as(config.precision))
    if config.tokens:
        formula = f"{config.tokens} tokens * {n_layers} layers * {epoch / tokens / n_layers:.1f} bytes"
        text = f"{_size(epoch)} an epoch ({config.precision})"
        lines.append(Line("reading", "bytes_per_epoch", epoch, text, formula))
        for speed in config.read_speeds:
            hours = config.epochs * epoch / speed / 1e9 / 3600
            lines.append(
                Line(
                    "reading",
                    f"hours_at_{speed:g}_GB_per_s",
                    hours,
                    f"{_hours(hours)} at {speed:g} GB/s",
                    f"{config.epochs:g} epochs * {_size(epoch)} / {speed:g} GB/s",
                )
            )
        lines.append(_shuffle_line(config, config.tokens))
    else:
        formula = f"{n_layers} layers * {epoch / tokens / n_layers:.1f} bytes"
        text = f"{_size(epoch / tokens)} a token and epoch ({config.precision})"
        lines.append(Line("reading", "bytes_per_token", epoch / tokens, text, formula))
    return lines


def _shuffle_line(config: PlanConfig, tokens: int) -> Line:
    sizes = (config.batch_tokens, config.sample_tokens, tokens)
    windows = config.shuffle_windows
    m = predicted_partners(*sizes, config.window, config.buffer_tokens, shuffle_windows=windows)
    perfect = perfect_partners(*sizes)
    return Line(
        "reading",
        "shuffle_m",
        m,
        f"a token will meet {m:.2f} others of its sample in a batch; {perfect:.2f} if order were perfect",
        f"train/order.py, predicted_partners: about (batch {config.batch_tokens} - 1) * "
        f"(sample {config.sample_tokens:g} - 1) * (chunk 64 / (buffer {config.buffer_tokens} * "
        f"window {config.window}) + 1 / "
        f"{min(tokens, (windows or tokens) * config.window)} tokens that are mixed)",
    )


def render(lines: list[Line], explain: bool) -> str:
    """As text for a terminal; explain: each line with its formula below."""
    shown, section = [], ""
    for line in lines:
        shown.append(f"{line.section if line.section != section else '':<10}{line.text}")
        section = line.section
        if explain:
            shown.append(f"{'':<12}= {line.formula}")
    return "\n".join(shown)


def to_json(lines: list[Line], explain: bool) -> dict[str, Any]:
    """{section: {key: value}}; explain: and {"formulas": {section.key: text}}."""
    found: dict[str, Any] = {}
    for line in lines:
        found.setdefault(line.section, {})[line.key] = line.value
    if explain:
        found["formulas"] = {f"{line.section}.{line.key}": line.formula for line in lines}
    return found


def _parts(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
