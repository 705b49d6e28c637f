"""Sums over tokens, kept apart by group (kind, sink or not), from which means and variances follow.

Kept as float64 sums, so that windows, ranks and choices of kinds add up without a second pass.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layout import KINDS, N_GROUPS

Doubles = npt.NDArray[np.float64]


@dataclass
class SiteSums:
    """Sums of one site over the tokens of each group."""

    sum: Doubles
    """(group, layer, channel): sum of values"""
    square: Doubles
    """(group, layer): sum of squared norms"""
    noise: Doubles
    """(group, layer): sum of squared differences between the true and the stored vector"""
    absmax: Doubles
    """(group, layer): largest absolute value"""

    @classmethod
    def zeros(cls, n_layers: int, d_model: int) -> "SiteSums":
        per_layer = (N_GROUPS, n_layers)
        return cls(np.zeros((*per_layer, d_model)), *(np.zeros(per_layer) for _ in range(3)))

    def add(self, other: "SiteSums") -> None:
        self.sum += other.sum
        self.square += other.square
        self.noise += other.noise
        np.maximum(self.absmax, other.absmax, out=self.absmax)


@dataclass
class Statistics:
    """Moments of one site over chosen groups; variance is summed over channels, as FVU needs it."""

    tokens: int
    mean: Doubles
    """(layer, channel)"""
    variance: Doubles
    """(layer,): mean squared distance from the mean"""
    rms: Doubles
    """(layer,): root mean square of a value"""
    absmax: Doubles
    """(layer,)"""
    noise_fvu: Doubles
    """(layer,): squared difference between true and stored vectors, over the variance"""


@np.errstate(invalid="ignore", over="ignore")  # NaN and infinity are told in the moments, not warned of
def summarise(
    sums: SiteSums, count: npt.NDArray[np.int64], groups: npt.NDArray[np.bool_] | Doubles
) -> Statistics:
    """Moments over the tokens whose group is chosen; all zero where there is none.

    groups: (group,) whether it is chosen, or the share of it that is, as if it were a random one.
    """
    share = groups.astype(np.float64)
    tokens = round(float((count * share).sum()))
    n = max(float((count * share).sum()), 1)
    mean = np.tensordot(share, sums.sum, 1) / n
    square = np.tensordot(share, sums.square, 1) / n
    variance = np.maximum(square - np.einsum("lc,lc->l", mean, mean), 0)
    noise = np.tensordot(share, sums.noise, 1) / n
    return Statistics(
        tokens=tokens,
        mean=mean,
        variance=variance,
        rms=np.sqrt(square / mean.shape[1]),
        absmax=sums.absmax[share > 0].max(axis=0, initial=0.0),
        noise_fvu=np.divide(noise, variance, out=np.zeros_like(noise), where=variance > 0),
    )


def group_mask(kinds: list[str] | None = None, sinks: bool | None = None) -> npt.NDArray[np.bool_]:
    """(group,): the groups of these kinds (None: all) that are sinks (True), are not (False), or either."""
    kind_names = np.array(KINDS * 2)
    is_sink = np.arange(N_GROUPS) >= len(KINDS)
    chosen = np.isin(kind_names, list(KINDS) if kinds is None else kinds)
    return chosen if sinks is None else chosen & (is_sink == sinks)
