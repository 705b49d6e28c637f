"""`clt features`: one pass over a cache with a run's encoders, and the pages of what it found.

Layer by layer: the layer's inputs are read once and encoded; statistics and examples are kept in arrays of
(latent, a few), the codes go to a scratch file. The examples are then looked up there, for the activation on
every token of their samples, and the layer's pages are written. So no more than one layer is held, and what
is done stays done: the state of a layer is saved every `save_seconds`, and a run that was cut off, or killed,
goes on there and gives the same pages.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..cache_format.files import write_file
from ..cache_format.layout import KINDS
from ..devices import find_device
from ..harvest.provenance import SourceData
from ..progress import Progress
from ..stopping import StopRequested, stop_on_signals
from ..train.checkpoint import checkpoint_folder, load_shape
from ..train.loop import open_source
from ..train.run_folder import load_config
from ..train.shape import Shape
from ..train.source import Source
from .chosen import choose, gather
from .code_file import CodeFile
from .directions import directions, load_encoder
from .feature_pages import LayerPages, write_layer, write_pages
from .latents import LatentStatistics, Sizes, bin_edges
from .layer_reader import SITE, LayerReader
from .sample_pages import BLOCK as SAMPLE_BLOCK
from .sample_pages import SampleWriter, Strings, TokenTable
from .unembedding import Unembedding, load_unembedding

WORK = ".work"
DONE = "features.json"


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What `clt features` is told."""

    run: Path
    """Run folder, or one checkpoint in it"""
    out: Path
    """Folder of the pages"""
    caches: tuple[Path, ...] = ()
    """None: the run's own"""
    split: str = "train"
    dataset: str | None = None
    """Where the dataset lies now; None: where it lay"""
    model: str | None = None
    """Its unembedding gives promoted and suppressed tokens"""
    sizes: Sizes = field(default_factory=Sizes)
    quantiles: int = 10
    """Examples of each latent at evenly spaced quantiles of its activations"""
    similar: int = 8
    batch_tokens: int = 4096
    threads: int | None = None
    device: str | None = None
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        counts = {"top": self.sizes.top, "quantiles": self.quantiles, "batch-tokens": self.batch_tokens}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"--{name}: expected at least 1, found {count}")


class FeaturesReport(NamedTuple):
    out: Path
    layers: int
    latents: int
    """Of each layer"""
    active: int
    """Latents that were positive for some token"""
    tokens: int
    tokens_per_s: float | None
    """Through all layers; None where all layers were done before"""
    waiting: float | None
    """Share of the pass's time that was spent waiting for the reader"""
    samples: int
    """That the pages show"""
    notes: list[str]
    """What could not be shown, and why"""

    def render(self) -> str:
        """As text for a terminal."""
        lines = [
            f"{self.active} of {self.layers * self.latents} latents are active on {self.tokens} tokens; "
            f"{self.samples} samples are shown"
        ]
        if self.tokens_per_s is not None and self.waiting is not None:
            speed = f"{self.tokens_per_s:.0f} tokens/s through {self.layers} layers"
            lines.append(f"{speed}, {self.waiting:.1%} of the time waiting for the reader")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"open {self.out / 'index.html'}"])


class _Pass(NamedTuple):
    """What all layers share."""

    config: FeaturesConfig
    folder: Path
    """Of the checkpoint"""
    shape: Shape
    source: Source
    table: TokenTable
    strings: Strings
    unembedding: Unembedding | None
    device: torch.device
    columns: tuple[Tensor, Tensor]
    """sample and kind of every token, on the device"""

    @property
    def work(self) -> Path:
        return self.config.out / WORK


@torch.no_grad()
def write_features(config: FeaturesConfig) -> FeaturesReport:
    """Write the pages, or go on where it was interrupted; ValueError where `out` holds something else."""
    folder = checkpoint_folder(config.run)
    shape = load_shape(folder)
    source = open_source(load_config(folder.parent), config.split, config.caches or None)
    _require_same_layers(source, shape)
    if _begin(config, _identity(config, folder, source)):
        return _report(config.out)
    data = [SourceData(cache.manifest.source, config.dataset) for cache in source.caches]
    device = find_device(config.device)
    table = TokenTable(source)
    unembedding = load_unembedding(config.model, shape.d_model, device) if config.model else None
    columns = (torch.from_numpy(source.sample).to(device), torch.from_numpy(source.kind).to(device))
    work = _Pass(config, folder, shape, source, table, Strings(data[0]), unembedding, device, columns)
    with stop_on_signals():
        seconds, waited, encoded = _layers(work)
        samples, missing = _write_samples(work, data)
    notes = sorted({note for one in data for note in one.notes})
    notes += [f"{why}{f' ({n} samples)' if n > 1 else ''}" for why, n in missing.items()]
    if config.model is None:
        notes.append("promoted and suppressed tokens are not computed: no --model whose unembedding to use")
    report = {
        "layers": shape.n_layers,
        "latents": shape.n_latents,
        "tokens": source.n_tokens,
        "tokens_per_s": encoded / shape.n_layers / seconds if seconds else None,
        "waiting": waited / seconds if seconds else None,
        "samples": len(samples),
        "notes": notes,
    }
    _finish(work, samples, report)
    return _report(config.out)


def memory_bytes(shape: Shape, n_tokens: int, batch_tokens: int, sizes: Sizes) -> int:
    """At most, of host and device together, the reader's batches and a layer's examples aside.

    One layer's arrays, twice while they are saved; its encoder and three matrices of its size; a batch's
    inputs and pre-activations; the table of the source's tokens.
    """
    arrays = 2 * LatentStatistics.memory_bytes(shape.n_latents, sizes)
    weights = 4 * 4 * shape.n_latents * shape.d_model
    batch = 4 * batch_tokens * (2 * shape.d_model + 3 * shape.n_latents)
    return arrays + weights + batch + 60 * n_tokens


def _layers(work: _Pass) -> tuple[float, float, int]:
    """Every layer that is not done: seconds of encoding, those of them that were waited, tokens encoded."""
    seconds, waited, encoded = 0.0, 0.0, 0
    layers, n_tokens = work.shape.n_layers, work.source.n_tokens
    left = [place for place in range(layers) if not _done_file(work, place).exists()]
    done = (layers - len(left)) * n_tokens
    with Progress("features", total=layers * n_tokens, unit="tokens x layers", done=done) as progress:
        for place in left:
            took, stood, tokens = _one_layer(work, place, progress)
            seconds, waited, encoded = seconds + took, waited + stood, encoded + tokens
    return seconds, waited, encoded


def _one_layer(work: _Pass, place: int, progress: Progress) -> tuple[float, float, int]:
    layer, shape = work.shape.layers[place], work.shape
    statistics = LatentStatistics(shape.n_latents, *work.columns, work.config.sizes)
    scratch = work.work / f"codes-{layer}"
    group, codes = _restore(work, place, statistics, scratch)
    progress.add(codes.tokens, f"layer {layer}")
    before = codes.tokens
    reader = LayerReader(work.source, place, work.config.batch_tokens, work.config.threads)
    model = load_encoder(work.folder, place).to(work.device)
    began = saved = time.monotonic()

    def save(group: int) -> None:
        codes.sync()
        at = {"group": str(group), "tokens": str(codes.tokens), "codes": str(codes.codes)}
        _write_state(_state_file(work, place), statistics.state(), at)

    for following, batch in reader.batches(group):
        values = batch.values(SITE, 0, work.device, model.inputs.mean.dtype)
        found = model.encode_layer(model.inputs.apply_to(values, 0), 0)
        statistics.add(found, torch.from_numpy(batch.token).to(work.device))
        codes.add(found)
        progress.add(len(batch), f"layer {layer}")
        if time.monotonic() - saved > work.config.save_seconds or StopRequested.requested:
            save(following)
            saved = time.monotonic()
            StopRequested.check()
    seconds, encoded = time.monotonic() - began, codes.tokens - before
    save(len(reader.groups))
    _write_layer_pages(work, place, statistics, codes)
    return seconds, reader.waited, encoded


def _write_layer_pages(work: _Pass, place: int, statistics: LatentStatistics, codes: CodeFile) -> None:
    """The layer's part of the pages; its scratch goes when that is done."""
    layer, config = work.shape.layers[place], work.config
    chosen = choose(statistics, work.table.sample, config.quantiles)
    counted = np.flatnonzero(work.source.chosen)
    found = gather(chosen, codes, counted, work.table.sample, work.shape.n_latents)
    weights = directions(work.folder, place, config.similar, work.unembedding, work.device)
    pages = LayerPages.of(layer, statistics, chosen, found, weights)
    write_layer(config.out, pages, work.table, work.strings)
    shown = np.unique(work.table.sample[chosen.token]).tolist()
    active = int((statistics.by_kind.sum(dim=1) > 0).sum())
    write_file(_done_file(work, place), json.dumps({"samples": shown, "active": active}).encode())
    _state_file(work, place).unlink()
    codes.remove()


def _write_samples(work: _Pass, data: list[SourceData]) -> tuple[list[int], dict[str, int]]:
    """Texts and pictures of all samples that some layer shows; their numbers, and what is missing."""
    shown: set[int] = set()
    for place in range(work.shape.n_layers):
        shown |= set(json.loads(_done_file(work, place).read_text())["samples"])
    samples = sorted(shown)
    writer = SampleWriter(work.source, work.table, data, work.config.out)
    with Progress("texts and pictures", total=len(samples), unit="samples", leave=False) as progress:
        for number, first in enumerate(range(0, len(samples), SAMPLE_BLOCK)):
            StopRequested.check()
            some = samples[first : first + SAMPLE_BLOCK]
            writer.write_block(number, some)
            progress.add(len(some))
    return samples, dict(writer.missing)


def _finish(work: _Pass, samples: list[int], report: dict[str, Any]) -> None:
    """The pages themselves, and what `clt features` says at the end; then the work folder goes."""
    source, shape, folder = work.source, work.shape, work.folder
    counts = np.bincount(source.kind[source.chosen], minlength=len(KINDS)).tolist()
    layers = [json.loads(_done_file(work, place).read_text()) for place in range(shape.n_layers)]
    report |= {"active": sum(layer["active"] for layer in layers)}
    about = {
        "run": folder.parent.name,
        "checkpoint": folder.name,
        "model": str(source.manifest.source.get("model")),
        "split": work.config.split,
        "layers": shape.layers,
        "latents": shape.n_latents,
        "n_targets": shape.n_targets,
        "activation": shape.activation,
        "tokens": dict(zip(KINDS, counts, strict=True)),
        "bins": bin_edges(),
        "sample_blocks": samples[::SAMPLE_BLOCK],
        "unembedding": work.unembedding is not None,
        "active": report["active"],
        "notes": report["notes"],
    }
    write_pages(work.config.out, about)
    done = {"identity": json.loads(_identity_file(work.config.out).read_text()), "report": report}
    write_file(work.config.out / DONE, (json.dumps(done, indent=1) + "\n").encode())
    shutil.rmtree(work.work)


def _report(out: Path) -> FeaturesReport:
    """Of a folder that is complete."""
    return FeaturesReport(out, **json.loads((out / DONE).read_text())["report"])


def _identity(config: FeaturesConfig, folder: Path, source: Source) -> dict[str, Any]:
    """What pages of one folder must agree in, in words for people."""
    return {
        "checkpoint": f"{folder.parent.name}/{folder.name}",
        "weights": _weights_stamp(folder),
        "cache": source.fingerprint,
        "split": config.split,
        "selection": source.selection.to_json(),
        "model": config.model,
        "examples": [*config.sizes, config.quantiles, config.similar, config.batch_tokens],
    }


def _weights_stamp(folder: Path) -> int:
    """Bytes of all weights and when they were written: another run of the same name is another one."""
    files = sorted(folder.glob("layers.*/transcoder.safetensors"))
    return sum(file.stat().st_size + file.stat().st_mtime_ns for file in files)


def _begin(config: FeaturesConfig, identity: dict[str, Any]) -> bool:
    """Make `out`, or find in it what this call began, or (True) finished; ValueError for anything else."""
    out = config.out
    there: dict[str, Any] | None = None
    if (out / DONE).exists():
        there = json.loads((out / DONE).read_text())["identity"]
    elif _identity_file(out).exists():
        there = json.loads(_identity_file(out).read_text())
    if there is not None:
        differing = [name for name, value in identity.items() if there.get(name) != value]
        if differing:
            raise ValueError(
                f"{out} holds other pages (another {', another '.join(differing)}); remove it, or choose "
                "another --out"
            )
        return (out / DONE).exists()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no folder of pages; choose another --out")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    write_file(_identity_file(out), json.dumps(identity).encode())
    return False


def _identity_file(out: Path) -> Path:
    return out / WORK / "identity.json"


def _require_same_layers(source: Source, shape: Shape) -> None:
    if source.layers != shape.layers or source.manifest.d_model != shape.d_model:
        raise ValueError(
            f"the cache has layers {source.layers} of {source.manifest.d_model} channels, the run "
            f"{shape.layers} of {shape.d_model}; give --cache one of the same model and layers"
        )


def _restore(work: _Pass, place: int, statistics: LatentStatistics, scratch: Path) -> tuple[int, CodeFile]:
    """Where the layer was left: the next group, and its codes so far."""
    path = _state_file(work, place)
    if not path.exists():
        return 0, CodeFile(scratch)
    with safe_open(path, "pt") as file:
        at = file.metadata()
        statistics.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return int(at["group"]), CodeFile(scratch, int(at["tokens"]), int(at["codes"]))


def _write_state(path: Path, state: dict[str, Tensor], at: dict[str, str]) -> None:
    write_file(path, save({name: tensor.cpu() for name, tensor in state.items()}, at))


def _state_file(work: _Pass, place: int) -> Path:
    return work.work / f"layer-{work.shape.layers[place]}.safetensors"


def _done_file(work: _Pass, place: int) -> Path:
    return work.work / f"layer-{work.shape.layers[place]}.json"
