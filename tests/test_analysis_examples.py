"""The best activations of each latent, whatever the batches, against sorting everything at once."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.analysis.examples import Kept, random_scores, spread
from clt.analysis.latents import BINS, LatentStatistics, Sizes, bin_edges
from clt.cache_format.permutation import mix
from clt.train.sparse import Codes

LATENTS, TOKENS, SAMPLES = 5, 60, 9


def slow(score: npt.NDArray[Any], sample: npt.NDArray[Any], n: int) -> list[list[int]]:
    """By latent, the n tokens of highest score of different samples; score (token, latent), 0 is no code."""
    best = []
    for latent in range(score.shape[1]):
        tokens = sorted(np.flatnonzero(score[:, latent]), key=lambda t: (-score[t, latent], t))
        first: dict[int, int] = {}
        for token in tokens:
            first.setdefault(int(sample[token]), int(token))
        best.append(list(first.values())[:n])
    return best


@st.composite
def streams(draw: st.DrawFn) -> tuple[npt.NDArray[Any], npt.NDArray[Any], list[int], int]:
    """Few different activations, so that many are equal; where batches end; how many are kept."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.integers(0, draw(st.integers(1, 6)), (TOKENS, LATENTS)).astype(np.float32)
    cuts = sorted(draw(st.sets(st.integers(1, TOKENS - 1), max_size=6)))
    return values, rng.integers(0, SAMPLES, TOKENS), cuts, draw(st.integers(1, 7))


@given(streams())
def test_what_is_kept_is_the_best_of_different_samples(stream: Any) -> None:
    values, sample, cuts, n = stream
    kept = Kept(LATENTS, n, torch.from_numpy(sample))
    for first, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        token, latent = (torch.from_numpy(a) for a in np.nonzero(values[first:end]))
        value = torch.from_numpy(values[first:end])[token, latent]
        kept.offer(latent, value, value, token + first)
    expected = slow(values, sample, n)
    for latent in range(LATENTS):
        found = kept.token[latent]
        assert found[found >= 0].tolist() == expected[latent]
        assert kept.value[latent][found >= 0].tolist() == [values[t, latent] for t in expected[latent]]


def test_random_scores_are_splitmix64_and_uniform() -> None:
    latent, token = torch.arange(7).repeat(3000), torch.arange(21_000)
    found = random_scores(latent, token).numpy()
    with np.errstate(over="ignore"):
        words = mix(token.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        words = mix(words + latent.numpy().astype(np.uint64))
    np.testing.assert_array_equal(found, (words >> np.uint64(11)) * 2.0**-53)
    counts = np.histogram(found, bins=10, range=(0, 1))[0]
    assert abs(counts - 2100).max() < 5 * 2100**0.5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 30])
def test_spread_takes_even_quantiles_from_lowest_to_highest(count: int) -> None:
    kept = Kept(1, 30, torch.arange(100))
    value = torch.arange(1, count + 1).float().flip(0)
    kept.offer(torch.zeros(count, dtype=torch.long), torch.rand(count), value, torch.arange(count))
    place, quantile = spread(kept, 4)
    found = {
        round(q, 2): kept.value[0, p].item()
        for p, q in zip(place[0], quantile[0].tolist(), strict=True)
        if p >= 0
    }
    expected = {0: {}, 1: {0.0: 1}, 2: {0.0: 1, 1.0: 2}, 3: {0.0: 1, 0.5: 2, 1.0: 3}}
    assert found == expected.get(count, {0.0: 1, 0.34: 11, 0.66: 20, 1.0: 30})


def test_statistics_are_those_of_dense_activations() -> None:
    rng = np.random.default_rng(1)
    dense = (rng.exponential(2, (TOKENS, LATENTS)) * (rng.random((TOKENS, LATENTS)) < 0.4)).astype(np.float32)
    kind, sample = rng.integers(0, 4, TOKENS).astype(np.uint8), np.arange(TOKENS) // 7
    statistics = LatentStatistics(LATENTS, torch.from_numpy(sample), torch.from_numpy(kind), Sizes(3, 100))
    for first, end in ((0, 10), (10, 11), (11, TOKENS)):
        part = torch.from_numpy(dense[first:end])
        statistics.add(Codes.at(part >= 0, part), torch.arange(first, end))  # zeros are among the codes
    for latent in range(LATENTS):
        for number in range(4):
            assert statistics.by_kind[latent, number] == (dense[kind == number, latent] > 0).sum()
        expected = np.histogram(dense[dense[:, latent] > 0, latent], bin_edges())[0]
        assert statistics.histogram[latent].tolist() == expected.tolist()
        best = statistics.top.token[latent].tolist()
        assert best == slow(dense, sample, 3)[latent]
        drawn = statistics.random.token[latent]
        assert set(sample[drawn[drawn >= 0]]) == set(sample[dense[:, latent] > 0])
    assert statistics.histogram.shape == (LATENTS, BINS)
    held = sum(tensor.numel() * tensor.element_size() for tensor in statistics.state().values())
    assert held == LatentStatistics.memory_bytes(LATENTS, Sizes(3, 100))
