"""Samples packed into forward passes: by length, so that little is padding, in an order that is not."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache_format.permutation import permutation
from .tokens import SEQUENCE_INPUTS, PreparedSample

POOL_BATCHES = 12
"""Samples of this many batches are sorted by length together: of lengths like LLaVA-Instruct's, 2 % of the
forward is then padding (4: 5 %)."""


class Batch(NamedTuple):
    samples: list[PreparedSample]
    inputs: dict[str, Tensor]
    keep: Tensor
    """(sample, position): stored"""


def wants_more(pool: Sequence[PreparedSample], place: int, batch_tokens: int) -> bool:
    """Whether a pool should grow before it is packed; place: of its first sample in its rank's order.

    The first pool is one batch, and later ones at most double what was read before, so that the model begins
    while the feed does. It depends on nothing but the place: a resumed harvest makes the same pools.
    """
    tokens = sum(sample.length for sample in pool)
    return tokens < batch_tokens or (tokens < POOL_BATCHES * batch_tokens and len(pool) < place)


def pack(pool: Sequence[PreparedSample], batch_tokens: int, seed: int) -> Iterator[list[PreparedSample]]:
    """Cut a pool into batches of at most `batch_tokens` with padding (a longer sample is alone).

    The batches come in random order: whoever stops in the middle has not seen the short samples only.
    """
    batches: list[list[PreparedSample]] = []
    for sample in sorted(pool, key=lambda sample: (sample.length, sample.number)):
        if not batches or (len(batches[-1]) + 1) * sample.length > batch_tokens:
            batches.append([])
        batches[-1].append(sample)
    for place in permutation(len(batches), seed, pool[0].number):
        yield batches[place]


def cut(samples: Sequence[PreparedSample], budget: int) -> Iterator[list[PreparedSample]]:
    """The samples in their order, in portions of at most `budget` tokens with padding (or one sample)."""
    portion: list[PreparedSample] = []
    for sample in samples:
        if portion and padded_tokens([*portion, sample]) > budget:
            yield portion
            portion = []
        portion.append(sample)
    if portion:
        yield portion


def padded_tokens(samples: Sequence[PreparedSample]) -> int:
    """Tokens of one forward pass over all of them."""
    return len(samples) * max(sample.length for sample in samples)


def collate(samples: list[PreparedSample]) -> Batch:
    """Pad on the right; a causal model then gives each token what it gives without the padding."""
    length = max(sample.length for sample in samples)
    inputs: dict[str, Tensor] = {}
    for name in {name for sample in samples for name in sample.inputs}:
        if name in SEQUENCE_INPUTS:  # a sample without pictures may lack some: its tokens are all of type 0
            blank = torch.zeros((1, length), dtype=torch.long)
            parts = [sample.inputs.get(name, blank) for sample in samples]
        else:
            parts = [sample.inputs[name] for sample in samples if name in sample.inputs]
        inputs[name] = torch.cat(_padded(parts))
    keep = np.zeros((len(samples), length), bool)
    for row, sample in zip(keep, samples, strict=True):
        row[: sample.length] = sample.keep
    return Batch(samples, inputs, torch.from_numpy(keep))


def _padded(parts: list[Tensor]) -> list[Tensor]:
    """Zeros behind each axis but the first, up to the longest: of tokens, and of a picture's tiles."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    missing = [[most - here for here, most in zip(part.shape[1:], shape, strict=True)] for part in parts]
    return [
        torch.nn.functional.pad(part, [side for axis in reversed(gaps) for side in (0, axis)])
        for part, gaps in zip(parts, missing, strict=True)
    ]
