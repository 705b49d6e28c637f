"""Which tokens count: by kind, by id, sinks or not, and of a kind a share."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..cache_format.layout import KINDS
from ..cache_format.permutation import random_words


class Selection(NamedTuple):
    """Tokens that count."""

    kinds: tuple[str, ...] = KINDS
    exclude: tuple[str, ...] = ()
    """Kinds, and "sink"."""
    exclude_token_ids: tuple[int, ...] = ()
    """Of the vocabulary"""
    keep_kind: tuple[tuple[str, float], ...] = ()
    """(kind, share): that share of its tokens counts, the same ones in every epoch, on every rank"""
    seed: int = 0
    """Of that share"""

    @property
    def kept_kinds(self) -> list[str]:
        return [kind for kind in self.kinds if kind not in self.exclude]

    @property
    def sinks(self) -> bool | None:
        """As `group_mask` wants it: False leaves sinks out, None takes both."""
        return False if "sink" in self.exclude else None

    def to_json(self) -> dict[str, Any]:
        """Lists for tuples, as they come back from JSON."""
        data = self._asdict()
        lists = {name: list(data[name]) for name in ("kinds", "exclude", "exclude_token_ids")}
        return {**data, **lists, "keep_kind": [list(pair) for pair in self.keep_kind]}

    def chosen(
        self, kind: npt.NDArray[np.uint8], sink: npt.NDArray[np.bool_], token_id: npt.NDArray[np.int32] | None
    ) -> npt.NDArray[np.bool_]:
        """(token,) whether it counts; token_id may be None where no ids are excluded."""
        kept = np.isin(np.arange(256), [KINDS.index(name) for name in self.kept_kinds])
        chosen = kept[kind]  # a table: isin of the column itself would take ten times its memory
        if self.sinks is False:
            chosen &= ~sink
        if self.exclude_token_ids:
            assert token_id is not None
            chosen &= ~np.isin(token_id, self.exclude_token_ids)
        for name, share in self.keep_kind:
            number = KINDS.index(name)
            words = random_words(len(kind), self.seed, number)
            chosen &= (kind != number) | (words >> np.uint64(11) < share * 2.0**53)
        return chosen
