"""The examples that a page shows: which they are, and what the latent does on the whole sample of each."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .code_file import CodeFile
from .examples import spread
from .latents import LatentStatistics

Ints = npt.NDArray[np.int64]
TOP = -1.0
"""In place of a quantile."""
BLOCK_TOKENS = 4096
"""Tokens whose codes are looked at together."""


class Chosen(NamedTuple):
    """Examples of one layer, by latent, top ones first and falling, then quantiles from high to low."""

    latent: Ints
    """(example,) ascending"""
    token: Ints
    """(example,) number in the source: where it was chosen"""
    value: npt.NDArray[np.float32]
    """(example,) activation there"""
    quantile: npt.NDArray[np.float64]
    """(example,) among the activations of its latent, 0 to 1; TOP for a top one"""

    def of(self, latent: int) -> slice:
        first, end = np.searchsorted(self.latent, [latent, latent + 1]).tolist()
        return slice(first, end)

    def part(self, latents: range) -> "Chosen":
        """Those of some neighbouring latents."""
        mine = slice(*np.searchsorted(self.latent, [latents.start, latents.stop]).tolist())
        return Chosen(self.latent[mine], self.token[mine], self.value[mine], self.quantile[mine])


class Activations(NamedTuple):
    """Of each example's latent, on the tokens of the example's sample."""

    starts: Ints
    """(example + 1,)"""
    token: Ints
    value: npt.NDArray[np.float32]


def choose(statistics: LatentStatistics, sample: npt.NDArray[np.int32], quantiles: int) -> Chosen:
    """Top examples, and quantile examples whose samples are not among the top ones."""
    top = statistics.top
    place, quantile = spread(statistics.random, quantiles)
    at = place.clamp(min=0)
    token = statistics.random.token.gather(1, at).masked_fill(place < 0, -1).cpu().numpy()
    value = statistics.random.value.gather(1, at).cpu().numpy()
    best = top.token.cpu().numpy()
    again = (sample[token][:, :, None] == np.where(best < 0, -1, sample[best])[:, None, :]).any(axis=2)
    token = np.where(again, -1, token)[:, ::-1]
    parts = (
        (np.arange(len(best))[:, None], np.arange(len(best))[:, None]),
        (best, token),
        (top.value.cpu().numpy(), value[:, ::-1]),
        (np.full(best.shape, TOP), quantile.cpu().numpy()[:, ::-1]),
    )
    width = best.shape[1] + token.shape[1]
    latent = np.broadcast_to(parts[0][0], (len(best), width))
    tokens, values, quantile_of = (np.concatenate(pair, axis=1) for pair in parts[1:])
    kept = tokens >= 0
    return Chosen(latent[kept], tokens[kept], values[kept], quantile_of[kept])


def gather(
    chosen: Chosen, codes: CodeFile, counted: Ints, sample: npt.NDArray[np.int32], n_latents: int
) -> Activations:
    """Each example's latent wherever it is active in the sample.

    counted (token,): numbers of the tokens that `codes` holds, in its order. Holds what it finds; of a latent
    at most as much as it was positive, for its examples are of different samples.
    """
    if not len(chosen.token):
        return Activations(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    key = sample[chosen.token].astype(np.int64) * n_latents + chosen.latent
    order = np.argsort(key, kind="stable")
    wanted = key[order]
    needed = np.zeros(int(sample.max()) + 1, bool)
    needed[sample[chosen.token]] = True
    examples, tokens, values = [], [], []
    for block in codes.blocks(BLOCK_TOKENS):
        mine = np.flatnonzero((block.latent >= chosen.latent[0]) & (block.latent <= chosen.latent[-1]))
        mine = mine[needed[sample[counted[block.row[mine]]]]]
        token, latent, value = counted[block.row[mine]], block.latent[mine], block.value[mine]
        here = sample[token].astype(np.int64) * n_latents + latent
        place = np.searchsorted(wanted, here)
        found = np.flatnonzero(wanted[np.minimum(place, len(wanted) - 1)] == here)
        examples.append(order[place[found]])
        tokens.append(token[found])
        values.append(value[found])
    example = np.concatenate([np.zeros(0, np.int64), *examples])
    by_example = np.argsort(example, kind="stable")
    starts = np.searchsorted(example[by_example], np.arange(len(chosen.token) + 1))
    return Activations(
        starts,
        np.concatenate([np.zeros(0, np.int64), *tokens])[by_example],
        np.concatenate([np.zeros(0, np.float32), *values])[by_example],
    )
