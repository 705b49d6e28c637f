"""One pass over a layer's inputs with its encoder: statistics, examples, and the layer's pages."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..progress import Progress
from ..stopping import StopRequested
from ..train.shape import Shape
from ..train.source import Source
from .chosen import choose, gather
from .code_file import CodeFile
from .directions import directions, load_encoder
from .feature_pages import LayerPages, together, write_latents, write_list
from .features_config import FeaturesConfig
from .features_folder import FeaturesFolder, LayerDone
from .latents import LatentStatistics
from .layer_reader import SITE, LayerReader
from .sample_pages import Strings, TokenTable
from .unembedding import Unembedding


class PassTime(NamedTuple):
    """How long encoding took, pages left out."""

    seconds: float = 0.0
    waited: float = 0.0
    """Of them, for the reader"""
    tokens: int = 0
    """Times layers"""

    def plus(self, other: "PassTime") -> "PassTime":
        return PassTime(self.seconds + other.seconds, self.waited + other.waited, self.tokens + other.tokens)


class LayerPass(NamedTuple):
    """What the passes over all layers share."""

    config: FeaturesConfig
    folder: FeaturesFolder
    checkpoint: Path
    shape: Shape
    source: Source
    table: TokenTable
    strings: Strings
    unembedding: Unembedding | None
    device: torch.device
    columns: tuple[Tensor, Tensor]
    """sample and kind of every token, on the device"""

    def all_layers(self) -> PassTime:
        """Those that are not done."""
        spent, n_tokens = PassTime(), self.source.n_tokens
        left = [place for place, layer in enumerate(self.shape.layers) if self.folder.layer(layer) is None]
        total, done = (n * n_tokens for n in (self.shape.n_layers, self.shape.n_layers - len(left)))
        with Progress("features", total=total, unit="tokens x layers", done=done) as progress:
            for place in left:
                spent = spent.plus(self.one_layer(place, progress))
        return spent

    def one_layer(self, place: int, progress: Progress) -> PassTime:
        layer = self.shape.layers[place]
        statistics = LatentStatistics(self.shape.n_latents, *self.columns, self.config.sizes)
        group, codes = self.folder.restore(layer, statistics)
        progress.add(codes.tokens, f"layer {layer}")
        before = codes.tokens
        reader = LayerReader(self.source, place, self.config.batch_tokens, self.config.threads)
        model = load_encoder(self.checkpoint, place).to(self.device)
        began = saved = time.monotonic()
        for following, batch in reader.batches(group):
            values = batch.values(SITE, 0, self.device, model.inputs.mean.dtype)
            found = model.encode_layer(model.inputs.apply_to(values, 0), 0)
            del values
            statistics.add(found, torch.from_numpy(batch.token).to(self.device))
            codes.add(found)
            progress.add(len(batch), f"layer {layer}")
            if time.monotonic() - saved > self.config.save_seconds or StopRequested.requested:
                self.folder.save(layer, statistics, following, codes)
                saved = time.monotonic()
                StopRequested.check()
        del model
        spent = PassTime(time.monotonic() - began, reader.waited, codes.tokens - before)
        self.folder.save(layer, statistics, len(reader.groups), codes)
        self._write_pages(place, statistics, codes)
        return spent

    def _write_pages(self, place: int, statistics: LatentStatistics, codes: CodeFile) -> None:
        """The layer's part of the pages, some latents at a time: their examples are looked up together."""
        layer, config, out = self.shape.layers[place], self.config, self.folder.out
        sample = self.table.sample
        chosen = choose(statistics, sample, config.quantiles)
        counted = np.flatnonzero(self.source.chosen)
        weights = directions(self.checkpoint, place, config.similar, self.unembedding, self.device)
        counts, histogram = (c.cpu().numpy() for c in (statistics.by_kind, statistics.histogram))
        most = (config.sizes.top + config.quantiles) * self.table.longest
        rows = []
        for latents in together(counts, most):
            some = chosen.part(latents)
            found = gather(some, codes, counted, sample, self.shape.n_latents)
            pages = LayerPages(layer, counts, histogram, some, found, weights)
            rows += write_latents(out, pages, latents, self.table, self.strings)
        write_list(out, layer, counts, rows)
        shown = np.unique(sample[chosen.token]).tolist()
        self.folder.finish_layer(layer, LayerDone(shown, int(counts.any(axis=1).sum())), codes)
