"""Seeded order without stored state: hashes, permutations, and a keyed bijection of 0..n-1.

Everything is built on splitmix64 (Steele, Lea, Flood 2014), in plain uint64 arithmetic, so that an order
written today is the same on every machine and under every numpy, for ever.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


def mix(words: Words) -> Words:
    """splitmix64's finaliser: a bijection of 64-bit words that looks random."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_key(*key: int) -> np.uint64:
    """One word from several non-negative integers; their order counts."""
    word = np.zeros(1, np.uint64)
    for part in key:
        word = mix(word + _STEP + np.uint64(part))
    return np.uint64(word[0])


def random_words(n: int, *key: int) -> Words:
    """The first n outputs of splitmix64 seeded with `key`."""
    return mix(hash_key(*key) + _STEP * np.arange(1, n + 1, dtype=np.uint64))


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A random permutation of 0..n-1, decided by `key`; O(n log n) time, O(n) memory."""
    return np.argsort(random_words(n, *key), kind="stable")


class Bijection:
    """A keyed permutation of 0..n-1 that is evaluated where asked, in O(1) memory.

    A Feistel network over the smallest square power of two that holds n; values that fall outside
    0..n-1 walk on along their cycle until they fall inside (Black and Rogaway 2002).
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = random_words(_FEISTEL_ROUNDS, *key)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of `positions` (each in 0..n-1)."""
        values = self._scramble(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = self._scramble(values[outside])
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _scramble(self, values: Words) -> Words:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half) | right
