"""The best few activations of each latent, from a stream of codes, with sorts alone.

A latent keeps the `n` activations of highest score, of different samples: with the activation as the score
its top examples, with a hash a uniform sample of all its activations. What is kept depends neither on how the
stream was cut into batches nor on where it was interrupted.
"""

import torch
from torch import Tensor

_STEP, _MIX_1, _MIX_2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64, as signed integers, whose products wrap as unsigned ones do."""


class Kept:
    """By latent, in order of score: score, activation and token, (latent, n); token -1 where there is none.

    `sample` (token,): the sample of each token of the source. `dtype`: of the scores.

    What may be kept waits until it is half as much as what is kept, because sorting it in costs as much as
    sorting that. No more waits than that and one batch.
    """

    def __init__(self, n_latents: int, n: int, sample: Tensor, dtype: torch.dtype = torch.float32) -> None:
        size = (n_latents, n)
        self._sample = sample
        self._n_samples = int(sample.max()) + 1
        self._score = torch.full(size, -torch.inf, dtype=dtype, device=sample.device)
        self._value = torch.zeros(size, device=sample.device)
        self._token = torch.full(size, -1, dtype=torch.int64, device=sample.device)
        self._waiting: list[tuple[Tensor, ...]] = []

    @property
    def value(self) -> Tensor:
        self._sort_in()
        return self._value

    @property
    def token(self) -> Tensor:
        self._sort_in()
        return self._token

    def offer(self, latent: Tensor, score: Tensor, value: Tensor, token: Tensor) -> None:
        """Activations, (code,) each, of tokens behind all that were offered before, tokens ascending."""
        last = self._score[:, -1].index_select(0, latent)
        better = (score > last).nonzero()[:, 0]  # of equal scores the first token's stays
        if len(better):
            new = (part.index_select(0, better) for part in (latent, score, value, token))
            self._waiting.append(tuple(new))
        if sum(len(part[0]) for part in self._waiting) > self._token.numel() // 2:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self._waiting:
            return
        latent, score, value, token = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        rows = torch.bincount(latent, minlength=len(self._token)).nonzero()[:, 0]
        held = self._token[rows] >= 0
        latent = torch.cat([rows[:, None].expand_as(held)[held], latent])
        score, value, token = (
            torch.cat([kept[rows][held], new])
            for kept, new in ((self._score, score), (self._value, value), (self._token, token))
        )
        order = torch.sort(score, descending=True, stable=True).indices
        order = order[self._first_of_sample(latent[order], token[order])]
        order = order[torch.sort(latent[order], stable=True).indices]
        latent = latent[order]
        place = torch.arange(len(latent), device=latent.device) - torch.searchsorted(latent, latent)
        fits = place < self._score.shape[1]
        order, at = order[fits], (latent[fits], place[fits])
        for kept, new, none in (
            (self._score, score, -torch.inf),
            (self._value, value, 0),
            (self._token, token, -1),
        ):
            kept[rows] = none
            kept[at] = new[order]

    def _first_of_sample(self, latent: Tensor, token: Tensor) -> Tensor:
        """(code,) whether it is the first one of its latent and sample."""
        group, order = torch.sort(latent * self._n_samples + self._sample[token], stable=True)
        first = torch.ones_like(group, dtype=torch.bool)
        first[1:] = group[1:] != group[:-1]
        return torch.zeros_like(first).index_put_((order,), first)

    def state(self) -> dict[str, Tensor]:
        self._sort_in()
        return {"score": self._score, "value": self._value, "token": self._token}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def random_scores(latent: Tensor, token: Tensor) -> Tensor:
    """(code,) float64 in [0, 1), a hash of latent and token: splitmix64's finaliser of both."""
    words = _mix(_mix(token * _STEP) + latent)
    return _shift(words, 11).double() * 2.0**-53


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift(words, 30)) * _MIX_1
    words = (words ^ _shift(words, 27)) * _MIX_2
    return words ^ _shift(words, 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def spread(kept: Kept, n: int) -> tuple[Tensor, Tensor]:
    """n activations of each latent's sample, at evenly spaced quantiles from the lowest to the highest.

    Both (latent, n): place on the latent's row of `kept`, -1 where it has fewer; quantile, 0 to 1.
    """
    count = (kept.token >= 0).sum(dim=1, keepdim=True)
    value = torch.where(kept.token >= 0, kept.value, torch.inf)
    order = torch.sort(value, dim=1, stable=True).indices
    steps = torch.linspace(0, 1, n, dtype=torch.float64, device=value.device)
    rank = (steps * (count - 1).clamp(min=0)).round().long()
    again = torch.zeros_like(rank, dtype=torch.bool)
    again[:, 1:] = rank[:, 1:] == rank[:, :-1]
    place = order.gather(1, rank).masked_fill(again | (rank >= count), -1)
    return place, rank / (count - 1).clamp(min=1)
