"""How well a transcoder does on held-out tokens, from the cache alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from .exchange import ALONE, Exchange
from .reader import Batch, read_in_order
from .selection import Selection
from .source import Source, default_threads, has_variance
from .transcoder import CrossLayerTranscoder

Doubles = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    tokens: int
    fvu: Doubles
    """(layer,): squared error over the split's own variance"""
    fvu_kind: dict[str, Doubles]
    """by kind (layer,): error and variance of that kind's tokens alone; only kinds that vary"""
    fvu_without_offset: dict[int, float]
    """by offset t - s: mean FVU over layers when what sources write across it is left out"""
    l0: Doubles
    """(layer,): mean positive activations of a token"""
    dead: Doubles
    """(layer,): share of latents that are positive for none of the tokens"""

    def to_json(self, layers: tuple[int, ...]) -> dict[str, Any]:
        def by_layer(values: Doubles) -> dict[str, float]:
            return dict(zip(map(str, layers), values.tolist(), strict=True))

        return {
            "tokens": self.tokens,
            "fvu": float(self.fvu.mean()),
            "fvu_layer": by_layer(self.fvu),
            "fvu_kind": {kind: float(values.mean()) for kind, values in self.fvu_kind.items()},
            "fvu_without_offset": {str(offset): value for offset, value in self.fvu_without_offset.items()},
            "l0": float(self.l0.mean()),
            "l0_layer": by_layer(self.l0),
            "dead": float(self.dead.mean()),
            "dead_layer": by_layer(self.dead),
        }


class _Sums:
    """Squared errors so far, in model units."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        layers, latents = model.shape.n_layers, model.shape.n_latents
        offsets = min(model.shape.n_targets, layers)
        self.kind = np.zeros((layers, len(KINDS)))
        self.without = np.zeros((offsets, layers))
        self.active = np.zeros(layers)
        self.fired = np.zeros((layers, latents), bool)
        self.tokens = 0

    def gather(self, exchange: Exchange) -> None:
        """Those of the layers that other ranks have."""
        for sums in (self.kind, self.without, self.active):
            sums[...] = exchange.sum_shards(torch.from_numpy(sums)).numpy()
        self.fired[...] = exchange.sum_shards(torch.from_numpy(self.fired.astype(np.uint8))).numpy()


def evaluate(
    model: CrossLayerTranscoder,
    source: Source,
    *,
    batch_tokens: int = 2048,
    threads: int | None = None,
    after_batch: Callable[[int], None] = lambda tokens: None,
    exchange: Exchange = ALONE,
) -> Evaluation:
    """One pass over the source's chosen tokens, in the order on disk; `after_batch` is told their number.

    Of many ranks every replica takes the whole pass, and has the same numbers at its end.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "threads": threads, "after_batch": after_batch}
    return evaluate_all([model], source, exchange=exchange, **options)[0]


@torch.no_grad()
def evaluate_all(
    models: Sequence[CrossLayerTranscoder],
    source: Source,
    *,
    batch_tokens: int = 2048,
    threads: int | None = None,
    after_batch: Callable[[int], None] = lambda tokens: None,
    exchange: Exchange = ALONE,
) -> list[Evaluation]:
    """As `evaluate`, of many transcoders on one device from one pass: each token is decoded once."""
    sums = [_Sums(model) for model in models]
    device = models[0].inputs.mean.device
    with ThreadPoolExecutor(threads or default_threads(), "clt-decode") as pool:
        for chunks in read_in_order(source, batch_tokens):
            place, token = source.tokens_of(chunks)
            if len(place):
                rows = source.allocate(len(chunks))
                source.fill(rows, chunks, pool)
                batch = Batch(rows.take(place, pool), token, source.own)
                if len(models) > 1:
                    batch = batch.to(device)
                for model, its_sums in zip(models, sums, strict=True):
                    _add(its_sums, model, batch, source.kind[token], exchange)
                after_batch(len(place))
    for its_sums in sums:
        its_sums.gather(exchange)
    return [_summary(its_sums, source) for its_sums in sums]


def _add(
    sums: _Sums,
    model: CrossLayerTranscoder,
    batch: Batch,
    kind: npt.NDArray[np.uint8],
    exchange: Exchange,
) -> None:
    device, dtype = model.inputs.mean.device, model.inputs.mean.dtype
    codes = {}
    for source in model.own:
        standard = model.inputs.apply_to(batch.values("mlp_in", source, device, dtype), source)
        codes[source] = model.encode_layer(standard, source)
        positive = codes[source].values > 0
        sums.active[source] += int(positive.sum())
        sums.fired[source, codes[source].columns[positive].cpu().numpy()] = True
    exchange.codes([codes], [len(batch)])
    for target in model.own:
        truth = model.outputs.apply_to(batch.values("mlp_out", target, device, dtype), target)
        square = float(model.outputs.scale[target]) ** 2
        written = {
            target - source: codes[source].decode(model.decoder(source, target))
            for source in model.shape.sources(target)
        }
        error = model.b_dec[target] - truth + torch.stack(list(written.values())).sum(dim=0)
        if model.shape.skip:
            inputs = model.inputs.apply_to(batch.values("mlp_in", target, device, dtype), target)
            error.addmm_(inputs, model.arithmetic(model.W_skip[target]).T)
        per_token = _per_token(error)
        sums.kind[target] += square * np.bincount(kind, per_token, minlength=len(KINDS))
        for offset in range(len(sums.without)):
            left = _per_token(error - written[offset]) if offset in written else per_token
            sums.without[offset, target] += square * left.sum()
    sums.tokens += len(batch)


def _per_token(error: Tensor) -> Doubles:
    squares: Doubles = error.square().sum(dim=1).double().cpu().numpy()
    return squares


def _summary(sums: _Sums, source: Source) -> Evaluation:
    whole = source.statistics("mlp_out")
    total = whole.variance * whole.tokens
    by_kind = {}
    for kind in source.selection.kept_kinds:
        own = source.statistics("mlp_out", Selection((kind,), source.selection.exclude))
        if has_variance(own, whole):
            by_kind[kind] = sums.kind[:, KINDS.index(kind)] / (own.variance * own.tokens)
    return Evaluation(
        tokens=sums.tokens,
        fvu=sums.kind.sum(axis=1) / total,
        fvu_kind=by_kind,
        fvu_without_offset={offset: float((row / total).mean()) for offset, row in enumerate(sums.without)},
        l0=sums.active / max(1, sums.tokens),
        dead=1 - sums.fired.mean(axis=1),
    )
