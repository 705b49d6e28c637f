"""Seeded orders: bijections, the same on every machine and for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.cache_format.permutation import Bijection, hash_key, mix, permutation, random_words

KEY = st.lists(st.integers(0, 2**64 - 1), max_size=3)


@given(st.integers(0, 3000), KEY)
def test_bijection_is_a_permutation(n: int, key: list[int]) -> None:
    """Every number of 0..n-1 is the image of exactly one."""
    images = Bijection(n, *key)(np.arange(n))
    np.testing.assert_array_equal(np.sort(images), np.arange(n))


@given(st.integers(1, 2**50), KEY, st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_bijection_stays_inside_and_keeps_apart(n: int, key: list[int], asked: list[int]) -> None:
    """Images lie in the range, distinct for distinct places, whatever else is asked."""
    places = np.unique(np.array(asked) % n)
    images = Bijection(n, *key)(places)
    assert ((images >= 0) & (images < n)).all()
    assert len(np.unique(images)) == len(places)
    assert Bijection(n, *key)(places[:1])[0] == images[0]


@given(st.integers(0, 3000), KEY)
def test_permutation_is_a_permutation(n: int, key: list[int]) -> None:
    """Every number of 0..n-1 appears once."""
    np.testing.assert_array_equal(np.sort(permutation(n, *key)), np.arange(n))


@given(st.integers(2, 2**62), st.integers(0, 2**62), st.integers(0, 2**62))
def test_the_order_of_the_key_counts(a: int, b: int, c: int) -> None:
    """(a, b) and (b, a) are other keys, and so are (a,) and (a, 0)."""
    assert (hash_key(b, c) == hash_key(c, b)) == (b == c)
    assert hash_key(a) != hash_key(a, 0)


def test_mix_is_splitmix64() -> None:
    """The generator's published first outputs for seed 1234567."""
    state = np.uint64(1234567) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 4, dtype=np.uint64)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_written_orders_never_change() -> None:
    """These decide where every stored token lies and in what order it is trained on."""
    assert int(hash_key(7, 0)) == 13309476754707697221
    assert random_words(3, 7, 0).tolist() == [11241344834629033336, 7548029490970160968, 18386555679719319649]
    assert permutation(10, 7, 0).tolist() == [3, 7, 1, 6, 4, 0, 9, 5, 8, 2]
    assert permutation(128, 0, 3)[:8].tolist() == [76, 53, 120, 69, 30, 86, 44, 3]
    assert Bijection(10, 7, 0)(np.arange(10)).tolist() == [4, 6, 0, 3, 2, 5, 9, 1, 7, 8]
    assert Bijection(10**12, 7, 1)(np.arange(3)).tolist() == [492817368299, 283702717252, 616158697407]


@pytest.mark.parametrize("n", [1000, 1024, 1025])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_bijection_looks_random(n: int, seed: int) -> None:
    """Neighbours do not stay neighbours, and few numbers stay in place."""
    images = Bijection(n, seed)(np.arange(n))
    assert (np.abs(np.diff(images)) == 1).sum() < 20
    assert (images == np.arange(n)).sum() < 12
