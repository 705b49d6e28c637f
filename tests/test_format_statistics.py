"""Statistics: sums by group give the moments that a slow pass over all tokens gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format import open_cache
from clt.cache_format.layout import KINDS, N_GROUPS, SITES
from clt.cache_format.statistics import SiteSums, group_mask, summarise

LAYERS, WIDTH = 2, 5


def sums_of(values: Any, lost: Any, group: Any) -> SiteSums:
    """Token by token, as slowly as can be."""
    sums = SiteSums.zeros(LAYERS, WIDTH)
    for token, g in enumerate(group.tolist()):
        for layer in range(LAYERS):
            sums.sum[g, layer] += values[token, layer]
            sums.square[g, layer] += (values[token, layer] ** 2).sum()
            sums.noise[g, layer] += (lost[token, layer] ** 2).sum()
            sums.absmax[g, layer] = max(sums.absmax[g, layer], np.abs(values[token, layer]).max())
    return sums


@given(
    st.integers(1, 60),
    st.integers(0, 2**32),
    st.none() | st.lists(st.sampled_from(KINDS), unique=True),
    st.none() | st.booleans(),
    st.integers(0, 60),
)
def test_moments_are_numpys(n: int, seed: int, kinds: list[str] | None, sinks: bool | None, cut: int) -> None:
    """Over any choice of kinds and sinks, from sums of any two parts added up."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, LAYERS, WIDTH)) + 3
    lost = 0.01 * rng.standard_normal((n, LAYERS, WIDTH))
    group = rng.integers(0, N_GROUPS, n)
    sums = sums_of(values[:cut], lost[:cut], group[:cut])
    sums.add(sums_of(values[cut:], lost[cut:], group[cut:]))
    found = summarise(sums, np.bincount(group, minlength=N_GROUPS), group_mask(kinds, sinks))

    wanted = [KINDS[g % 4] in (kinds if kinds is not None else KINDS) for g in group]
    chosen = np.array(wanted) & ((group >= 4) == sinks if sinks is not None else True)
    assert found.tokens == chosen.sum()
    if not chosen.any():
        assert not found.mean.any()
        assert not found.noise_fvu.any()
        return
    part, noise = values[chosen], (lost[chosen] ** 2).sum(axis=2).mean(axis=0)
    variance = part.var(axis=0).sum(axis=1)
    np.testing.assert_allclose(found.mean, part.mean(axis=0))
    np.testing.assert_allclose(found.variance, variance, atol=1e-11)
    np.testing.assert_allclose(found.rms, np.sqrt((part**2).mean(axis=(0, 2))))
    np.testing.assert_allclose(found.absmax, np.abs(part).max(axis=(0, 2)))
    if chosen.sum() > 1:
        np.testing.assert_allclose(found.noise_fvu, noise / variance, rtol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "sinks"),
    [(None, None), (None, True), (["text"], True), (["text"], None), (["image", "bos"], False), ([], None)],
)
def test_a_caches_statistics_are_those_of_its_tokens(
    make_cache: Callable[..., Any], kinds: list[str] | None, sinks: bool | None
) -> None:
    """Moments are of the stored values; noise is their distance from the true ones, over the variance."""
    tiny = make_cache(lengths=(37, 50, 40, 9, 64))
    split = open_cache(tiny.path)["train"]
    table = split.tokens()
    codes = range(4) if kinds is None else [KINDS.index(kind) for kind in kinds]
    chosen = np.isin(table["kind"], list(codes))
    if sinks is not None:
        chosen &= table["sink"] == sinks
    pairs = zip(table["sample"].tolist(), table["position"].tolist(), strict=True)
    rows = [tiny.true["train", sample, position] for sample, position in pairs]
    for site in SITES:
        stored = split.read(site).astype(np.float64)[chosen]
        true = np.array([row[site] for row in rows], np.float64)[chosen]
        found = split.statistics(site, kinds, sinks)
        assert found.tokens == chosen.sum()
        if not chosen.any():
            continue
        variance = stored.var(axis=0).sum(axis=1)
        noise = ((stored - true) ** 2).sum(axis=2).mean(axis=0)
        np.testing.assert_allclose(found.mean, stored.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.variance, variance, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.absmax, np.abs(stored).max(axis=(0, 2)))
        varied = variance > 1e-6
        np.testing.assert_allclose(found.noise_fvu[varied], noise[varied] / variance[varied], rtol=1e-4)


def test_counts_are_those_of_the_token_table(make_cache: Callable[..., Any]) -> None:
    """Tokens by kind and sinks, over all writers."""
    tiny = make_cache(world_size=2)
    cache = open_cache(tiny.path)
    for name in ("train", "val"):
        split = cache[name]
        table = split.tokens()
        expected = np.bincount(table["kind"], minlength=4).tolist()
        assert split.counts() == dict(zip(KINDS, expected, strict=True))
        assert split.n_sinks == table["sink"].sum()


def test_group_mask_is_by_kind_and_sink() -> None:
    """Group = kind + 4 * sink."""
    assert np.flatnonzero(group_mask(["image"])).tolist() == [1, 5]
    assert np.flatnonzero(group_mask(None, True)).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(group_mask(["bos", "text"], False)).tolist() == [0, 2]
