"""Confidence intervals hold what they promise, on samples whose tokens are alike."""

import numpy as np

from clt.train.intervals import group_of, half_width, half_widths, share_half_width


def test_intervals_cover_the_truth_in_95_of_100_draws() -> None:
    """500 draws of 60 samples of different lengths, whose errors and deviations are their own."""
    rng = np.random.default_rng(0)
    inside, narrow = 0, 0
    for _ in range(500):
        length = rng.integers(1, 20, 60)
        base = length * rng.exponential(size=60)
        sums = base * rng.uniform(0.0, 0.4, 60)  # the ratio's mean is 0.2
        half = half_width(sums[:, None], base[:, None])
        inside += abs(sums.sum() / base.sum() - 0.2) < half
        narrow += abs(sums.sum() / base.sum() - 0.2) < half / 2
    assert 0.90 < inside / 500 < 0.98
    assert 0.55 < narrow / 500 < 0.78


def test_several_ratios_one_by_one_and_their_mean() -> None:
    rng = np.random.default_rng(1)
    base = rng.exponential(size=(30, 3))
    sums = base * rng.random((30, 3))
    one_by_one = [half_width(sums[:, [i]], base[:, [i]]) for i in range(3)]
    np.testing.assert_allclose(half_widths(sums, base), one_by_one)
    assert half_width(sums, base) < max(one_by_one)
    twice = half_width(np.concatenate([sums, np.zeros((5, 3))]), np.concatenate([base, np.zeros((5, 3))]))
    assert np.isclose(twice, half_width(sums, base), rtol=1e-12), "groups without a sample are none"


def test_one_sample_says_nothing() -> None:
    assert np.isnan(half_width(np.ones((1, 2)), np.ones((1, 2))))
    assert len(np.unique(group_of(np.arange(3000, dtype=np.int32)))) == 1024


def test_a_share_that_no_sample_met_is_as_sure_as_leaving_one_out_says() -> None:
    """40 things, each met by a sample with a chance of its own; the interval covers what other draws give."""
    rng = np.random.default_rng(2)
    chance = rng.uniform(0, 0.1, 40)
    shares, halves = [], []
    for _ in range(400):
        met = rng.random((30, 40)) < chance
        alone = met[:, met.sum(axis=0) == 1].sum(axis=1).astype(np.float64)
        without = np.array([1 - np.delete(met, i, axis=0).any(axis=0).mean() for i in range(30)])
        expected = 1.96 * np.sqrt(29 / 30 * ((without - without.mean()) ** 2).sum())
        halves.append(share_half_width(alone, 40, 30))
        shares.append(1 - met.any(axis=0).mean())
        assert np.isclose(halves[-1], expected, atol=1e-12)
    assert 0.85 < np.mean(np.abs(shares - np.mean(shares)) < halves) < 0.99
    assert np.isnan(share_half_width(np.ones(1), 40, 1))
