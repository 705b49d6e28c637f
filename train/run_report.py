"""What there is to report of a run, gathered from the trainer, metrics.jsonl and the cache."""

from typing import Any, NamedTuple

import numpy as np
import torch

from ..cache_format.layout import KINDS
from .config import TrainConfig
from .curves import Curves, Doubles
from .evaluate import Evaluation
from .exchange import Exchange
from .metrics import FiringCounts
from .shape import Shape
from .source import Source
from .transcoder import CrossLayerTranscoder


class Place(NamedTuple):
    """How far a run is."""

    step: int
    """Optimiser steps done"""
    steps: int
    """Of the whole run, as planned"""
    tokens: int


class RunReport(NamedTuple):
    """All that the page says."""

    name: str
    place: Place
    layers: tuple[int, ...]
    curves: Curves
    decoder_norms: Doubles
    """(source, target): see `decoder_norms`"""
    frequency: Doubles
    """(layer, latent): share of the counted tokens for which it was positive"""
    counted_tokens: int
    held_out: Evaluation | str
    """Or why there is no evaluation"""
    settings: dict[str, Any]
    cache: dict[str, Any]


def report_run(
    config: TrainConfig,
    source: Source,
    shape: Shape,
    place: Place,
    curves: Curves,
    norms: Doubles,
    firing: FiringCounts,
    held_out: Evaluation | str,
) -> RunReport:
    """What report.html says of a run; reads neither activations nor metrics.jsonl."""
    return RunReport(
        name=config.run.resolve().name,
        place=place,
        layers=shape.layers,
        curves=curves,
        decoder_norms=norms,
        frequency=firing.frequency().numpy(),
        counted_tokens=firing.tokens,
        held_out=held_out,
        settings=settings_of(config, shape),
        cache=identity_of(source),
    )


@torch.no_grad()
def decoder_norms(model: CrossLayerTranscoder, exchange: Exchange) -> Doubles:
    """(source, target): mean over latents of the norm of what one writes at activation 1; NaN: no decoder.

    In standard units, so that targets of different scale can be compared.
    """
    shape = model.shape
    norms = torch.zeros(shape.n_layers, shape.n_layers, dtype=torch.float64)
    for target in model.own:
        for source in shape.sources(target):
            norms[source, target] = torch.linalg.vector_norm(model.decoder(source, target), dim=1).mean()
    found: Doubles = exchange.sum_shards(norms).numpy()
    for target in range(shape.n_layers):
        found[[s for s in range(shape.n_layers) if s not in shape.sources(target)], target] = np.nan
    return found


def settings_of(config: TrainConfig, shape: Shape) -> dict[str, Any]:
    """All settings by their names, and the sizes that follow from them."""
    settings = config.to_json()
    structure = settings.pop("transcoder")
    sizes = {"parameters": f"{shape.n_parameters:,}", "decoders": shape.n_decoders}
    return {"latents of a layer": shape.n_latents, **sizes, **structure, **settings}


def identity_of(source: Source) -> dict[str, Any]:
    """What the caches are, and how many of their tokens count."""
    manifest = source.manifest
    kinds = np.bincount(source.kind[source.chosen], minlength=len(KINDS))
    return {
        **manifest.source,
        "fingerprint": source.fingerprint,
        "d_model": manifest.d_model,
        "layers": _ranges(manifest.layers),
        "precision": manifest.precision,
        "step_divisor": manifest.step_divisor,
        "window": manifest.window,
        "seed": manifest.seed,
        "tokens that count": f"{source.n_tokens:,} of {len(source.kind):,}",
        **{f"of them {kind}": f"{n:,}" for kind, n in zip(KINDS, kinds.tolist(), strict=True) if n},
    }


def _ranges(layers: tuple[int, ...]) -> str:
    contiguous = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if contiguous else ", ".join(map(str, layers))
