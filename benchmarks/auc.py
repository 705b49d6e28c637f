"""How well each latent's activations tell tokens apart: areas under ROC curves, from codes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from clt.train.sparse import Codes

Doubles = npt.NDArray[np.float64]


def auc(codes: Codes, chosen: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> Doubles:
    """(latent, word): chance that a true token's activation is above a false one's, ties half; nan without.

    Of the chosen tokens. Only codes are sorted: the other activations are 0, and all of one rank.
    """
    token, latent, value = (part.numpy() for part in (codes.tokens, codes.columns, codes.values))
    mine = chosen[token] & (value > 0)
    token, latent, value = token[mine], latent[mine], value[mine]
    order = np.lexsort((value, latent))
    token, latent, value = token[order], latent[order], value[order]
    zeros = chosen.sum() - np.bincount(latent, minlength=codes.n_latents)
    rank = zeros[latent] + 1 + _middle(latent, value) - np.searchsorted(latent, latent)
    n_true = truth[chosen].sum(axis=0)
    above = np.empty((codes.n_latents, len(n_true)))
    for word, n in enumerate(n_true.tolist()):
        true = truth[token, word]
        with_code = np.bincount(latent, true, minlength=codes.n_latents)
        ranks = np.bincount(latent, rank * true, minlength=codes.n_latents)
        above[:, word] = ranks + (n - with_code) * (zeros + 1) / 2 - n * (n + 1) / 2
    with np.errstate(invalid="ignore"):
        found: Doubles = above / (n_true * (chosen.sum() - n_true))
    return found


def _middle(latent: npt.NDArray[Any], value: npt.NDArray[Any]) -> Doubles:
    """(code,) of sorted codes: its place; of equal ones of one latent, the mean of their places."""
    new = np.ones(len(latent), bool)
    new[1:] = (latent[1:] != latent[:-1]) | (value[1:] != value[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(latent)) - 1
    middle: Doubles = np.repeat((first + last) / 2, last - first + 1)
    return middle
