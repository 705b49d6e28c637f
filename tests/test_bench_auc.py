"""The AUC that README's figures of latents rest on, against counting every pair."""

import sys
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.train.sparse import Codes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts beside each other, not a package

from auc import auc


def by_pairs(values: np.ndarray, truth: np.ndarray) -> float:
    """Share of (true, false) pairs in which the true token's activation is above, ties half."""
    won = [(float(a > b) + 0.5 * (a == b)) for a in values[truth] for b in values[~truth]]
    return sum(won) / len(won) if won else float("nan")


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 5))
def test_auc_is_the_share_of_pairs_in_order(seed: int, tokens: int, levels: int) -> None:
    """Few different activations, so that many tie; some codes are zeros, some words are true of no token."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, levels + 1, (tokens, 3)) * (rng.random((tokens, 3)) < 0.6) * 0.7
    chosen, truth = rng.random(tokens) < 0.8, rng.random((tokens, 4)) < (0.0, 0.3, 0.7, 1.0)
    places = torch.from_numpy((dense > 0) | (rng.random(dense.shape) < 0.2))
    found = auc(Codes.at(places, torch.from_numpy(dense)), chosen, truth)
    expected = [
        [by_pairs(dense[chosen, latent], truth[chosen, word]) for word in range(4)] for latent in range(3)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
