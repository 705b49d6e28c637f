"""`clt features`: one pass over a cache with a run's encoders, and the pages of what it found.

Layer by layer: the layer's inputs are read once and encoded; statistics and examples are kept in arrays of
(latent, a few), the codes go to a scratch file. The examples are then looked up there, for the activation on
every token of their samples, and the layer's pages are written. So no more than one layer is held, and what
is done stays done: the state of a layer is saved every `save_seconds`, and a run that was cut off, or killed,
goes on there and gives the same pages.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

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
from .feature_pages import write_pages
from .features_config import FeaturesConfig
from .features_folder import FeaturesFolder, identity_of
from .latents import bin_edges
from .layer_pass import LayerPass
from .sample_pages import BLOCK as SAMPLE_BLOCK
from .sample_pages import SampleWriter, Strings, TokenTable
from .unembedding import load_unembedding


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


@torch.no_grad()
def write_features(config: FeaturesConfig) -> FeaturesReport:
    """Write the pages, or go on where it was interrupted; ValueError where `out` holds something else."""
    checkpoint = checkpoint_folder(config.run)
    shape = load_shape(checkpoint)
    source = open_source(load_config(checkpoint.parent), config.split, config.caches or None)
    _require_same_layers(source, shape)
    folder = FeaturesFolder(config.out)
    if not folder.begin(identity_of(config, checkpoint, source)):
        data = [SourceData(cache.manifest.source, config.dataset) for cache in source.caches]
        layers = _passes(config, folder, checkpoint, source, data[0])
        with stop_on_signals():
            spent = layers.all_layers()
            samples, missing = _write_samples(layers, data)
        report = {
            "layers": shape.n_layers,
            "latents": shape.n_latents,
            "tokens": source.n_tokens,
            "tokens_per_s": spent.tokens / shape.n_layers / spent.seconds if spent.seconds else None,
            "waiting": spent.waited / spent.seconds if spent.seconds else None,
            "samples": len(samples),
            "notes": _notes(config, data, missing),
        }
        _finish(layers, samples, report)
    return FeaturesReport(config.out, **folder.report())


def _passes(
    config: FeaturesConfig, folder: FeaturesFolder, checkpoint: Path, source: Source, data: SourceData
) -> LayerPass:
    shape, device = load_shape(checkpoint), find_device(config.device)
    return LayerPass(
        config=config,
        folder=folder,
        checkpoint=checkpoint,
        shape=shape,
        source=source,
        table=TokenTable(source),
        strings=Strings(data),
        unembedding=load_unembedding(config.model, shape.d_model, device) if config.model else None,
        device=device,
        columns=(torch.from_numpy(source.sample).to(device), torch.from_numpy(source.kind).to(device)),
    )


def _write_samples(layers: LayerPass, data: list[SourceData]) -> tuple[list[int], dict[str, int]]:
    """Texts and pictures of all samples that some layer shows; their numbers, and what is missing."""
    found = [layers.folder.layer(layer) for layer in layers.shape.layers]
    samples = sorted({sample for done in found if done for sample in done.samples})
    writer = SampleWriter(layers.source, layers.table, data, layers.folder.out)
    with Progress("texts and pictures", total=len(samples), unit="samples", leave=False) as progress:
        for number, first in enumerate(range(0, len(samples), SAMPLE_BLOCK)):
            StopRequested.check()
            some = samples[first : first + SAMPLE_BLOCK]
            writer.write_block(number, some)
            progress.add(len(some))
    return samples, dict(writer.missing)


def _notes(config: FeaturesConfig, data: list[SourceData], missing: dict[str, int]) -> list[str]:
    """What the pages do not show, and why."""
    notes = sorted({note for one in data for note in one.notes})
    notes += [f"{why}{f' ({n} samples)' if n > 1 else ''}" for why, n in missing.items()]
    if config.model is None:
        notes.append("promoted and suppressed tokens are not computed: no --model whose unembedding to use")
    return notes


def _finish(layers: LayerPass, samples: list[int], report: dict[str, Any]) -> None:
    """The pages themselves, and what `clt features` says at the end; then the work folder goes."""
    source, shape, checkpoint = layers.source, layers.shape, layers.checkpoint
    counts = np.bincount(source.kind[source.chosen], minlength=len(KINDS)).tolist()
    report["active"] = sum(
        done.active for layer in shape.layers if (done := layers.folder.layer(layer)) is not None
    )
    about = {
        "run": checkpoint.parent.name,
        "checkpoint": checkpoint.name,
        "model": str(source.manifest.source.get("model")),
        "split": layers.config.split,
        "layers": shape.layers,
        "latents": shape.n_latents,
        "n_targets": shape.n_targets,
        "activation": shape.activation,
        "tokens": dict(zip(KINDS, counts, strict=True)),
        "bins": bin_edges(),
        "sample_blocks": samples[::SAMPLE_BLOCK],
        "unembedding": layers.unembedding is not None,
        "active": report["active"],
        "notes": report["notes"],
    }
    write_pages(layers.folder.out, about)
    layers.folder.finish(report)


def _require_same_layers(source: Source, shape: Shape) -> None:
    if source.layers != shape.layers or source.manifest.d_model != shape.d_model:
        raise ValueError(
            f"the cache has layers {source.layers} of {source.manifest.d_model} channels, the run "
            f"{shape.layers} of {shape.d_model}; give --cache one of the same model and layers"
        )
