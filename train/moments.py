"""Moments of the tokens that count, from the sums that each cache keeps by group (kind, sinks apart)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..cache_format import Split
from ..cache_format.layout import KINDS
from ..cache_format.statistics import SiteSums, Statistics, summarise

SAME = 1e-6
"""Tokens whose variance is below this share of the whole's are one vector and its rounding."""


def moments(
    splits: Sequence[Split], site: str, groups: npt.NDArray[np.float64], layer_indexes: Sequence[int]
) -> Statistics:
    """Of one site, of the layers at these places in the caches; groups (group,): the weight of each."""
    total = SiteSums.zeros(*splits[0].sums[0][site].sum.shape[1:])
    tokens = np.zeros(len(groups), np.int64)
    for split in splits:
        sums, count = split.sums
        total.add(sums[site])
        tokens += count
    whole = summarise(total, tokens, groups)
    fields = ("mean", "variance", "rms", "absmax", "noise_fvu")
    return Statistics(whole.tokens, *(getattr(whole, field)[list(layer_indexes)] for field in fields))


def group_shares(
    kind: npt.NDArray[np.uint8], sink: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """(group,): share of its tokens that count; all arguments (token,)."""
    group = kind + len(KINDS) * sink.astype(np.uint8)
    stored = np.bincount(group, minlength=2 * len(KINDS))
    left = np.bincount(group, weights=chosen, minlength=2 * len(KINDS))
    shares: npt.NDArray[np.float64] = left / np.maximum(stored, 1)
    return shares


def has_variance(part: Statistics, whole: Statistics) -> bool:
    """Whether the tokens of a part differ from each other: BOS, say, is the same vector every time."""
    return part.tokens > 1 and bool((part.variance > SAME * whole.variance).all())
