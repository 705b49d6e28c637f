"""What is summed over held-out tokens, by group of samples where intervals are made of it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..cache_format.layout import KINDS
from .exchange import Exchange
from .intervals import GROUPS
from .moments import has_variance
from .selection import Selection
from .source import Source
from .transcoder import CrossLayerTranscoder

Doubles = npt.NDArray[np.float64]


class HeldOutSums:
    """Squared errors so far, in model units, by group of samples."""

    def __init__(self, model: CrossLayerTranscoder, source: Source) -> None:
        layers, latents = model.shape.n_layers, model.shape.n_latents
        offsets = min(model.shape.n_targets, layers)
        self.kind = np.zeros((layers, GROUPS, len(KINDS)))
        self.without = np.zeros((offsets, layers, GROUPS))
        self.deviation = np.zeros((layers, GROUPS, len(KINDS) + 1))
        """Squared, of tokens of each kind from its own mean; in the last place, of all from theirs"""
        self.error = np.zeros((layers, model.shape.d_model))
        self.centred = np.zeros((layers, GROUPS))
        """Squared, of errors from their mean so far"""
        self.active = np.zeros((layers, GROUPS))
        self.last = np.zeros((layers, latents), np.int32)
        """1 + the largest group with a token for which the latent is positive; 0: none"""
        self.first = np.zeros((layers, latents), np.int32)
        """GROUPS - the smallest such group; 0: none"""
        self.counts = np.zeros((GROUPS, len(KINDS)))
        self.means = means_by_kind(source)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def fired(self) -> npt.NDArray[np.bool_]:
        """(layer, latent)"""
        return self.last > 0

    def add_active(self, layer: int, latents: npt.NDArray[np.int32], group: npt.NDArray[np.int64]) -> None:
        """Codes that are positive, each with the group of its token."""
        np.maximum.at(self.last[layer], latents, (group + 1).astype(np.int32))
        np.maximum.at(self.first[layer], latents, (GROUPS - group).astype(np.int32))

    def fired_in_one(self) -> Doubles:
        """(group, layer): latents that are positive in this group of samples and in no other."""
        only = self.fired & (self.last - 1 == GROUPS - self.first)
        rows = [
            np.bincount(last[one] - 1, minlength=GROUPS) for last, one in zip(self.last, only, strict=True)
        ]
        return np.stack(rows, axis=1).astype(np.float64)

    def gather(self, exchange: Exchange) -> None:
        """Those of the layers that other ranks have."""
        squares = (self.kind, self.without, self.deviation, self.error, self.centred)
        for sums in (*squares, self.active, self.last, self.first):
            sums[...] = exchange.sum_shards(torch.from_numpy(sums)).numpy()


class TokenGroups(NamedTuple):
    """Of a batch: (token,) kind, and group of the sample."""

    kind: npt.NDArray[np.uint8]
    group: npt.NDArray[np.int64]

    def by_kind(self, values: Doubles) -> Doubles:
        """(group, kind): sums of (token,)."""
        at, size = self.group * len(KINDS) + self.kind, GROUPS * len(KINDS)
        sums: Doubles = np.bincount(at, values, minlength=size).astype(np.float64)
        return sums.reshape(GROUPS, len(KINDS))

    def by_group(self, values: Doubles) -> Doubles:
        sums: Doubles = np.bincount(self.group, values, minlength=GROUPS).astype(np.float64)
        return sums


def means_by_kind(source: Source) -> dict[str | None, Doubles]:
    """(layer, d_model) of each kind that varies, and of all tokens (None), in model units."""
    whole = source.statistics("mlp_out")
    means: dict[str | None, Doubles] = {None: whole.mean}
    for kind in source.selection.kept_kinds:
        own = source.statistics("mlp_out", Selection((kind,), source.selection.exclude))
        if has_variance(own, whole):
            means[kind] = own.mean
    return means
