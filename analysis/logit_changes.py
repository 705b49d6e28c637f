"""Which tokens become more and less likely when latents are edited: mean changes of logits."""

from typing import Any

import torch
from torch import Tensor

SHOWN = 8


class LogitChanges:
    """Sums over predicted tokens; logits minus their mean over the vocabulary, which softmax does not see."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, original: Tensor, changed: Tensor) -> None:
        """(token, vocabulary) both"""
        change = changed.double() - original.double()
        total = (change - change.mean(dim=1, keepdim=True)).sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(change)

    def ends(self, tokenizer: Any) -> dict[str, list[list[Any]]]:
        """[token's string, mean change] of those that rise and those that fall most."""
        assert self._sum is not None
        mean = self._sum / self._count
        found = {}
        for name, sign in (("raised", 1), ("lowered", -1)):
            best = torch.topk(sign * mean, min(SHOWN, len(mean)))
            ids, values = best.indices.tolist(), (sign * best.values).tolist()
            found[name] = [[tokenizer.decode([i]), value] for i, value in zip(ids, values, strict=True)]
        return found
