"""What is logged: names are the same in metrics.jsonl and everywhere else."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from .order import measured_partners
from .reader import Batch
from .source import Selection, Source, has_variance
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

    def fvu(self, square_error: Tensor, kind_of: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, float]:
        """Mean over layers, by kind, of squared error (layer, token) over variance."""
        found = {}
        for kind, variance in self._variance.items():
            mine = torch.from_numpy(kind_of == KINDS.index(kind)).to(square_error.device)
            if mine.any():
                mean = square_error[:, mine].double().mean(dim=1).cpu().numpy()
                found[kind] = float((mean / variance).mean())
        return found


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


def step_metrics(
    result: StepResult, layers: tuple[int, ...], batches: list[Batch], variance: KindVariance
) -> dict[str, float]:
    """Numbers of one optimiser step."""
    token = np.concatenate([batch.token for batch in batches])
    by_kind = variance.fvu(result.square_error, variance.source.kind[token])
    sample = variance.source.sample
    return {
        "loss": float(result.loss),
        "fvu": float(result.fvu.mean()),
        **{f"fvu/{layer}": float(v) for layer, v in zip(layers, result.fvu, strict=True)},
        **{f"fvu_kind/{kind}": value for kind, value in by_kind.items()},
        **{f"l0/{layer}": float(v) for layer, v in zip(layers, result.l0, strict=True)},
        "shuffle_m": float(np.mean([measured_partners(sample[batch.token]) for batch in batches])),
    }


class MetricsFile:
    """metrics.jsonl: one line a logged step; on resume, lines after the checkpoint go."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
