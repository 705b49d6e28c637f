"""Sums over predicted tokens, by sample, and what follows from them with confidence intervals."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache_format.layout import KINDS

Doubles = npt.NDArray[np.float64]
MEASURES = ("ce", "rise", "kl", "top1")
"""Cross-entropy of the next token (nats), its rise over the original's, KL(original || this) (nats), and the
share of tokens for which the most likely next one is the original's."""


class Estimate(NamedTuple):
    """A mean over tokens; half_width: of its 95 % confidence interval, samples being what is drawn."""

    mean: float
    half_width: float


def compare(original: Tensor, changed: Tensor, truth: Tensor) -> Doubles:
    """(token, measure) in the order of MEASURES; logits (token, vocabulary), truth (token,)."""
    before, after = (logits.float().log_softmax(dim=-1) for logits in (original, changed))
    ce_before, ce_after = (-log.gather(1, truth[:, None])[:, 0] for log in (before, after))
    kl = (before.exp() * (before - after)).sum(dim=-1)
    same = before.argmax(dim=-1) == after.argmax(dim=-1)
    found = torch.stack([ce_after, ce_after - ce_before, kl, same.to(kl)], dim=1)
    values: Doubles = found.double().cpu().numpy()
    return values


class Scores:
    """Of one mode; kinds are those of the predicted tokens."""

    def __init__(self) -> None:
        self._sums: list[Doubles] = []
        """A sample each: (kind, measure + 1), the last column counts tokens"""

    @property
    def samples(self) -> int:
        return len(self._sums)

    def add(self, values: Doubles, kind: npt.NDArray[np.uint8]) -> None:
        """One sample's tokens: values (token, measure), kind (token,)."""
        sums = np.zeros((len(KINDS), len(MEASURES) + 1))
        np.add.at(sums, kind, np.column_stack([values, np.ones(len(values))]))
        self._sums.append(sums)

    def estimates(self, kind: str | None = None) -> dict[str, Estimate] | None:
        """By measure; None where no token of the kind was predicted."""
        sums = np.stack(self._sums)
        chosen = sums.sum(axis=1) if kind is None else sums[:, KINDS.index(kind)]
        n = chosen[:, -1]
        if not n.sum():
            return None
        return {name: _ratio(chosen[:, place], n) for place, name in enumerate(MEASURES)}

    def to_json(self) -> dict[str, Any]:
        """All kinds together, and by kind; a kind that is not there says why."""
        by_kind = {kind: self.estimates(kind) for kind in KINDS}
        none = "no token of this kind was predicted"
        return {
            "tokens": int(sum(sums[:, -1].sum() for sums in self._sums)),
            "samples": self.samples,
            **_plain(self.estimates()),
            "kinds": {kind: _plain(found) if found else none for kind, found in by_kind.items()},
        }


def _ratio(sums: Doubles, n: Doubles) -> Estimate:
    """Mean over all tokens, and the interval of a ratio estimate over samples."""
    mean = sums.sum() / n.sum()
    spread = np.square(sums - mean * n).sum() * len(n) / max(1, len(n) - 1)
    return Estimate(float(mean), float(1.96 * np.sqrt(spread) / n.sum()))


def _plain(found: dict[str, Estimate] | None) -> dict[str, Any]:
    return {name: each._asdict() for name, each in (found or {}).items()}
