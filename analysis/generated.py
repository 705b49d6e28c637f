"""Answers that a model generates as it is, and with its MLPs replaced or a latent edited, side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Generated(NamedTuple):
    """One answer, as text."""

    id: str
    truth: str
    """The dataset's"""
    original: str
    changed: str


class Answers(NamedTuple):
    generated: list[Generated]
    change: str
    """What was done to the model: `replaced`, or `edited`"""

    def to_json(self) -> dict[str, Any]:
        return {
            "generated": [self._named(each) for each in self.generated],
            "exact_match": self.exact_match(),
        }

    def exact_match(self) -> dict[str, float] | str:
        """Share of the answers that are the dataset's, before and after."""
        if not self.generated:
            return "not computed: nothing was generated, see --generate"
        right = [(each.original == each.truth, each.changed == each.truth) for each in self.generated]
        before, after = (sum(some) / len(right) for some in zip(*right, strict=True))
        return {"original": before, self.change: after}

    def render(self) -> Sequence[str]:
        """As lines for a terminal."""
        lines = []
        for each in self.generated:
            lines += [
                each.id,
                *(f"  {name:<9} {text}" for name, text in self._named(each).items() if name != "id"),
            ]
        match = self.exact_match()
        if isinstance(match, dict):
            before, after = match.values()
            n = len(self.generated)
            lines.append(f"exact match of {n} answers: {before:.1%} before, {after:.1%} {self.change}")
        return lines

    def _named(self, each: Generated) -> dict[str, str]:
        return {"id": each.id, "truth": each.truth, "original": each.original, self.change: each.changed}
