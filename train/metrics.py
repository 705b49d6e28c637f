"""What is logged: names are the same in metrics.jsonl and everywhere else."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from .curves import Curves, Doubles
from .exchange import ALONE, Exchange
from .moments import has_variance
from .order import measured_partners
from .reader import Batch
from .selection import Selection
from .source import Source
from .step import StepResult
from .transcoder import CrossLayerTranscoder


class KindVariance:
    """FVU by kind needs each kind's own variance: (layer,) in standard units, from the cache."""

    def __init__(self, source: Source, model: CrossLayerTranscoder) -> None:
        self.source = source
        scale = model.outputs.scale.cpu().double().numpy()
        whole = source.statistics("mlp_out")
        self._variance = {}
        for kind in source.selection.kept_kinds:
            own = source.statistics("mlp_out", Selection((kind,), source.selection.exclude))
            if has_variance(own, whole):
                self._variance[kind] = own.variance / scale**2

    @property
    def kinds(self) -> list[str]:
        return list(self._variance)

    def fvu(self, kind: str, mean_error: Doubles) -> float:
        """Mean over layers of a kind's mean squared error (layer,) over its variance."""
        return float((mean_error / self._variance[kind]).mean())


class DeadLatents:
    """Tokens since each latent was last positive."""

    def __init__(self, model: CrossLayerTranscoder, after_tokens: int) -> None:
        self.after_tokens = after_tokens
        self.since = torch.zeros(model.shape.n_layers, model.shape.n_latents, dtype=torch.int64)

    def update(self, fired: Tensor, tokens: int) -> None:
        """fired: (layer, latent), for how many of the tokens it was positive."""
        self.since += tokens
        self.since[fired.cpu() > 0] = 0

    def share(self) -> list[float]:
        """By layer: share of the latents that were not positive for `after_tokens` tokens."""
        dead: list[float] = (self.since >= self.after_tokens).double().mean(dim=1).tolist()
        return dead


class FiringCounts:
    """For how many tokens each latent was positive, over the last one to two periods.

    Counts of the whole run would hold what latents did before they were trained; so there are two counts,
    and the older one goes when the newer one is full.
    """

    def __init__(self, model: CrossLayerTranscoder, period_tokens: int) -> None:
        size = model.shape.n_layers, model.shape.n_latents
        self._period = period_tokens
        self._fired = torch.zeros(2, *size, dtype=torch.int64)
        self._tokens = torch.zeros(2, dtype=torch.int64)

    def update(self, fired: Tensor, tokens: int) -> None:
        if self._tokens[0] >= self._period:
            for counts in (self._fired, self._tokens):
                counts[1] = counts[0]
                counts[0] = 0
        self._fired[0] += fired.cpu()
        self._tokens[0] += tokens

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return int(self._tokens.sum())

    def frequency(self) -> Tensor:
        """(layer, latent) float64: share of the counted tokens."""
        return self._fired.sum(dim=0).double() / max(1, self.tokens)

    def state(self) -> dict[str, Tensor]:
        return {"fired": self._fired, "fired_tokens": self._tokens}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._fired, self._tokens = state["fired"], state["fired_tokens"]


class StepAverages:
    """Numbers of the steps since the last line of metrics.jsonl: nothing is dropped with `--log-every`.

    Each rank adds up those of its layers and tokens; a line has the sums over all.
    """

    def __init__(self, layers: tuple[int, ...], variance: KindVariance, exchange: Exchange = ALONE) -> None:
        self._layers, self._variance, self._exchange = layers, variance, exchange
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._loss = self._grad_norm = self._partners = self._seconds = self._waited = 0.0
        self._fvu, self._l0 = np.zeros(len(self._layers)), np.zeros(len(self._layers))
        self._extra: dict[str, float] = {}
        self._error = {kind: np.zeros(len(self._layers)) for kind in self._variance.kinds}
        self._count = dict.fromkeys(self._variance.kinds, 0)

    @property
    def empty(self) -> bool:
        return self._steps == 0

    def add(
        self, result: StepResult, batches: list[Batch], *, grad_norm: float, seconds: float, waited: float
    ) -> None:
        """One optimiser step, which took `seconds` and waited for its tokens for `waited` of them.

        result: of this rank; grad_norm: of all.
        """
        tokens = sum(len(batch.all_tokens) for batch in batches)
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._loss += tokens * float(result.loss)
        for name, value in result.extra.items():
            self._extra[name] = self._extra.get(name, 0.0) + tokens * float(value)
        self._fvu += tokens * _doubles(result.fvu)
        self._l0 += tokens * _doubles(result.l0)
        self._grad_norm += grad_norm
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited
        source = self._variance.source
        self._partners += float(np.mean([measured_partners(source.sample[b.all_tokens]) for b in batches]))
        kind_of = source.kind[np.concatenate([batch.token for batch in batches])]
        for kind in self._variance.kinds:
            mine = torch.from_numpy(kind_of == KINDS.index(kind)).to(result.square_error.device)
            self._error[kind] += _doubles(result.square_error[:, mine].double().sum(dim=1))
            self._count[kind] += int(mine.sum())

    def take(self) -> dict[str, float]:
        """The averages by name, and begin anew."""
        self._gather()
        tokens, steps, fvu, l0 = self._tokens, self._steps, self._fvu / self._tokens, self._l0 / self._tokens
        seen = [kind for kind, count in self._count.items() if count]
        numbers = {
            "loss": self._loss / tokens,
            **{name: value / tokens for name, value in self._extra.items()},
            "fvu": float(fvu.mean()),
            **{f"fvu/{layer}": float(v) for layer, v in zip(self._layers, fvu, strict=True)},
            **{f"fvu_kind/{k}": self._variance.fvu(k, self._error[k] / self._count[k]) for k in seen},
            **{f"l0/{layer}": float(v) for layer, v in zip(self._layers, l0, strict=True)},
            "grad_norm": self._grad_norm / steps,
            "shuffle_m": self._partners / steps,
            "tokens_per_s": tokens / self._seconds,
            "stall": self._waited / self._seconds,
        }
        self._reset()
        return numbers

    def _gather(self) -> None:
        """Sums over all ranks."""
        single = np.array([self._loss, self._waited, *self._extra.values()])
        errors = list(self._error.values())
        mine = torch.from_numpy(np.concatenate([single, self._fvu, self._l0, *errors]))
        total = self._exchange.total(mine).numpy()
        n_layers, world = len(self._layers), self._exchange.world
        single, rows = total[: len(single)], total[len(single) :].reshape(-1, n_layers)
        self._loss, self._waited = float(single[0]), float(single[1]) / world
        self._extra = dict(zip(self._extra, single[2:].tolist(), strict=True))
        self._fvu, self._l0, *errors = rows
        self._error = dict(zip(self._error, errors, strict=True))
        counts = self._exchange.sum_replicas(torch.tensor(list(self._count.values()), dtype=torch.int64))
        self._count = dict(zip(self._count, counts.tolist(), strict=True))


class MetricsFile:
    """metrics.jsonl: one line a logged step; on resume, lines after the checkpoint go.

    JSON has no NaN: a number that is not finite is written as null.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.curves = Curves()
        """Of all lines."""
        partial = path.with_name(f".{path.name}.partial")
        path.touch()
        with open(path) as old, open(partial, "w") as new:
            for text in old:
                line = json.loads(text) if text.endswith("\n") else None
                if line is not None and line["step"] <= last_step:
                    new.write(text)
                    self.curves.add(line)
        os.replace(partial, path)
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, metrics: dict[str, float]) -> None:
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self.curves.add(line)

    def close(self) -> None:
        self._file.close()


def _doubles(values: Tensor) -> Doubles:
    found: Doubles = values.double().cpu().numpy()
    return found
