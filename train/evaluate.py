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
from .held_out_memory import HELD_OUT_TOKENS
from .held_out_sums import HeldOutSums, TokenGroups
from .intervals import GROUPS, group_of, half_width, half_widths, share_half_width
from .reader import Batch, read_in_order
from .selection import Selection
from .source import Source, default_threads
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
    explained: Doubles
    """(layer,): explained variance, 1 - variance of the error over variance; a constant error costs none"""
    intervals: "Intervals"
    missing: dict[str, str]
    """by name in JSON: why a number is not there"""

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
            "explained_variance": float(self.explained.mean()),
            "explained_variance_layer": by_layer(self.explained),
            "ci95": self.intervals.to_json(by_layer),
            "not_computed": self.missing,
        }


class Intervals(NamedTuple):
    """Half widths of 95 % confidence intervals, samples being what is drawn: see `intervals`."""

    fvu: float
    fvu_layer: Doubles
    fvu_kind: dict[str, float]
    fvu_without_offset: dict[int, float]
    explained: float
    explained_layer: Doubles
    l0: float
    l0_layer: Doubles
    dead: float
    dead_layer: Doubles

    def to_json(self, by_layer: Callable[[Doubles], dict[str, float]]) -> dict[str, Any]:
        """nan, where fewer than two samples have tokens, is null."""

        def plain(values: dict[str, float]) -> dict[str, float | None]:
            return {name: value if np.isfinite(value) else None for name, value in values.items()}

        means = {"fvu": self.fvu, "explained_variance": self.explained, "l0": self.l0, "dead": self.dead}
        return {
            **plain(means),
            "fvu_layer": plain(by_layer(self.fvu_layer)),
            "explained_variance_layer": plain(by_layer(self.explained_layer)),
            "l0_layer": plain(by_layer(self.l0_layer)),
            "dead_layer": plain(by_layer(self.dead_layer)),
            "fvu_kind": plain(self.fvu_kind),
            "fvu_without_offset": plain({str(o): value for o, value in self.fvu_without_offset.items()}),
        }


def evaluate(
    model: CrossLayerTranscoder,
    source: Source,
    *,
    batch_tokens: int = HELD_OUT_TOKENS,
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
    batch_tokens: int = HELD_OUT_TOKENS,
    threads: int | None = None,
    after_batch: Callable[[int], None] = lambda tokens: None,
    exchange: Exchange = ALONE,
) -> list[Evaluation]:
    """As `evaluate`, of many transcoders on one device from one pass: each token is decoded once."""
    sums = [HeldOutSums(model, source) for model in models]
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
                tokens = TokenGroups(source.kind[token], group_of(source.sample[token]))
                for model, its_sums in zip(models, sums, strict=True):
                    _add(its_sums, model, batch, tokens, exchange)
                after_batch(len(place))
    for its_sums in sums:
        its_sums.gather(exchange)
    return [_summary(its_sums, source) for its_sums in sums]


def _add(
    sums: HeldOutSums,
    model: CrossLayerTranscoder,
    batch: Batch,
    tokens: TokenGroups,
    exchange: Exchange,
) -> None:
    device, dtype = model.inputs.mean.device, model.inputs.mean.dtype
    codes = {}
    for source in model.own:
        standard = model.inputs.apply_to(batch.values("mlp_in", source, device, dtype), source)
        codes[source] = model.encode_layer(standard, source)
        positive = codes[source].values > 0
        active = np.bincount(codes[source].tokens[positive].cpu().numpy(), minlength=len(batch))
        sums.active[source] += tokens.by_group(active.astype(np.float64))
        own = positive.cpu().numpy()
        columns, token = codes[source].columns.cpu().numpy()[own], codes[source].tokens.cpu().numpy()[own]
        sums.add_active(source, columns, tokens.group[token])
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
        sums.kind[target] += square * tokens.by_kind(per_token)
        sums.error[target] += square**0.5 * error.sum(dim=0).double().cpu().numpy()
        so_far = int(sums.counts.sum()) + len(batch)
        mean = torch.from_numpy(sums.error[target] / (square**0.5 * so_far)).to(error)
        centred = per_token - (2 * error @ mean - mean.square().sum()).double().cpu().numpy()
        sums.centred[target] += square * tokens.by_group(centred)
        sums.deviation[target] += square * _deviations(model, target, truth, sums.means, tokens)
        for offset in range(len(sums.without)):
            left = _per_token(error - written[offset]) if offset in written else per_token
            sums.without[offset, target] += square * tokens.by_group(left)
    sums.counts += tokens.by_kind(np.ones(len(batch)))


def _deviations(
    model: CrossLayerTranscoder,
    target: int,
    truth: Tensor,
    means: dict[str | None, Doubles],
    tokens: TokenGroups,
) -> Doubles:
    """(group, kind + 1): squared distances in standard units from each kind's mean, and from that of all."""
    shifts = {}
    for kind, mean in means.items():
        standard = torch.from_numpy(mean[target]).to(truth) - model.outputs.mean[target]
        shifts[kind] = standard / model.outputs.scale[target]
    ends = torch.stack(list(shifts.values()))
    square = truth.square().sum(dim=1, keepdim=True) - 2 * truth @ ends.T + ends.square().sum(dim=1)
    found = dict(zip(shifts, square.double().cpu().numpy().T, strict=True))
    out = np.zeros((GROUPS, len(KINDS) + 1))
    out[:, -1] = tokens.by_group(found[None])
    for number, name in enumerate(KINDS):
        if name in found:
            out[:, number] = tokens.by_kind(found[name])[:, number]
    return out


def _per_token(error: Tensor) -> Doubles:
    squares: Doubles = error.square().sum(dim=1).double().cpu().numpy()
    return squares


def _summary(sums: HeldOutSums, source: Source) -> Evaluation:
    whole = source.statistics("mlp_out")
    total = whole.variance * whole.tokens
    by_kind: dict[str, Doubles] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        if kind not in source.selection.kept_kinds:
            missing[f"fvu_kind.{kind}"] = "the run leaves tokens of this kind out"
        elif kind not in sums.means:
            few = (
                "no two of its tokens differ" if sums.counts[:, KINDS.index(kind)].any() else "no such tokens"
            )
            missing[f"fvu_kind.{kind}"] = f"{few} in split {source.split}"
        else:
            own = source.statistics("mlp_out", Selection((kind,), source.selection.exclude))
            by_kind[kind] = sums.kind.sum(axis=1)[:, KINDS.index(kind)] / (own.variance * own.tokens)
    squares = sums.kind.sum(axis=(1, 2))
    constant = np.square(sums.error).sum(axis=1) / max(1, sums.tokens)
    if (sums.counts.sum(axis=1) > 0).sum() < 2:
        missing["ci95"] = "fewer than two samples, so that nothing is known of how they differ"
    return Evaluation(
        tokens=sums.tokens,
        fvu=squares / total,
        fvu_kind=by_kind,
        fvu_without_offset={o: float((row.sum(axis=1) / total).mean()) for o, row in enumerate(sums.without)},
        l0=sums.active.sum(axis=1) / max(1, sums.tokens),
        dead=1 - sums.fired.mean(axis=1),
        explained=1 - (squares - constant) / total,
        intervals=_intervals(sums, list(by_kind)),
        missing=missing,
    )


def _intervals(sums: HeldOutSums, kinds: list[str]) -> Intervals:
    error, base = sums.kind.sum(axis=2).T, sums.deviation[:, :, -1].T  # (group, layer)
    numbers = {kind: KINDS.index(kind) for kind in kinds}
    per_group = sums.counts.sum(axis=1)
    tokens = np.broadcast_to(per_group[:, None], error.shape)
    alone, n_latents, n_groups = sums.fired_in_one(), sums.last.shape[1], int((per_group > 0).sum())
    return Intervals(
        fvu=half_width(error, base),
        fvu_layer=half_widths(error, base),
        fvu_kind={k: half_width(sums.kind[:, :, i].T, sums.deviation[:, :, i].T) for k, i in numbers.items()},
        fvu_without_offset={offset: half_width(row.T, base) for offset, row in enumerate(sums.without)},
        explained=half_width(sums.centred.T, base),
        explained_layer=half_widths(sums.centred.T, base),
        l0=half_width(sums.active.T, tokens),
        l0_layer=half_widths(sums.active.T, tokens),
        dead=share_half_width(alone.mean(axis=1), n_latents, n_groups),
        dead_layer=np.array([share_half_width(column, n_latents, n_groups) for column in alone.T]),
    )
