"""Activations: which latents are active for a token, and how gradients pass them.

topk       the k largest of relu(pre) of each token
groupmax   k groups of neighbouring latents, and of each group the largest of relu(pre)
batchtopk  the k * tokens largest of relu(pre) of all tokens of an optimiser step together; at inference,
           whatever reaches the running threshold (Bussmann et al. 2024, arXiv 2412.06410)
relu       relu(pre)
jumprelu   pre where pre > theta = exp(log_threshold), with a straight-through gradient for theta
           (Rajamanoharan et al. 2024, arXiv 2407.14435; Anthropic's update of January 2025)
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import cpu_codes
from .sparse import Codes

THRESHOLD_RATE = 0.01
"""Share of the newest step in batchtopk's running threshold."""

Pool = Callable[[Tensor], Tensor]
"""From values (n,) of one process, those of all that have a share of the tokens."""


class Activation:
    """The activation of one layer; pre-activations are (token, latent)."""

    def infer(self, pre: Tensor) -> Codes:
        """Codes of tokens that are looked at one by one."""
        raise NotImplementedError

    def train(self, pres: Iterable[Tensor], n_tokens: int, pool: Pool = lambda values: values) -> list[Codes]:
        """Codes of the micro-batches of one optimiser step, n_tokens in all; one pre is held at a time."""
        return [self.infer(pre) for pre in pres]

    def backward(self, codes: Codes, code_grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of pre-activations (code,), and of the activation's own parameters by name."""
        return through_relu(codes, code_grad), {}


class TopK(Activation):
    def __init__(self, k: int) -> None:
        self.k = k

    def infer(self, pre: Tensor) -> Codes:
        return top_k(pre, self.k)


class GroupMax(Activation):
    def __init__(self, k: int) -> None:
        self.k = k

    def infer(self, pre: Tensor) -> Codes:
        groups = pre.view(len(pre), self.k, pre.shape[1] // self.k)
        values, inside = groups.max(dim=2)
        first = torch.arange(0, pre.shape[1], groups.shape[2], device=pre.device)
        return Codes.rectangle(values.clamp_(min=0), inside + first, pre.shape[1])


class BatchTopK(Activation):
    """`threshold` (): running mean of the smallest value a step kept, changed in place; 0 at first."""

    def __init__(self, k: int, threshold: Tensor) -> None:
        self.k, self.threshold = k, threshold

    def infer(self, pre: Tensor) -> Codes:
        return Codes.at((pre >= self.threshold) & (pre > 0), pre)

    def train(self, pres: Iterable[Tensor], n_tokens: int, pool: Pool = lambda values: values) -> list[Codes]:
        """Micro-batches compete as if they were one batch; all that equal the smallest one kept are kept."""
        count, best = self.k * n_tokens, torch.zeros(0)
        codes = []
        for pre in pres:
            floor = best.min() if len(best) == count else pre.new_zeros(())
            floor = torch.maximum(floor, _nth_largest(pre, count, self.threshold / 2))
            codes.append(Codes.at((pre >= floor) & (pre > 0), pre))
            best = torch.cat([best.to(pre), codes[-1].values])
            best = best.topk(min(count, len(best)), sorted=False).values
        best = pool(best)
        if len(best) > count:
            best = best.topk(count, sorted=False).values
        if not len(best):
            return codes
        smallest = best.min()
        self.threshold += (THRESHOLD_RATE if self.threshold > 0 else 1) * (smallest - self.threshold)
        return [part.where(part.values >= smallest) for part in codes]


class Relu(Activation):
    def infer(self, pre: Tensor) -> Codes:
        return Codes.at(pre > 0, pre)


class JumpRelu(Activation):
    """`log_threshold` (latent,), and the width of the rectangle around theta where theta has a gradient."""

    def __init__(self, log_threshold: Tensor, bandwidth: float) -> None:
        self.theta, self.bandwidth = log_threshold.exp(), bandwidth

    def infer(self, pre: Tensor) -> Codes:
        return Codes.at(pre > self.theta, pre)

    def train(self, pres: Iterable[Tensor], n_tokens: int, pool: Pool = lambda values: values) -> list[Codes]:
        """What lies in the lower half of the rectangle is among the codes, as zeros."""
        low = self.theta - self.bandwidth / 2
        return [Codes.at(pre > low, torch.where(pre > self.theta, pre, 0)) for pre in pres]

    def backward(self, codes: Codes, code_grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """d a / d log_threshold = -theta / bandwidth inside the rectangle, as Anthropic's update has it."""
        theta = self.theta[codes.columns]
        near = codes.values < theta + self.bandwidth / 2  # zeros are codes only where they are near
        change = code_grad * near * (-theta / self.bandwidth)
        return through_relu(codes, code_grad), {"log_threshold": codes.by_latent(change)}


def top_k(pre: Tensor, k: int) -> Codes:
    """The k largest of relu(pre), (token, latent); where fewer are positive the rest are zeros."""
    if cpu_codes.is_compiled(pre):
        return Codes.rectangle(*cpu_codes.top_k(pre, k), pre.shape[1])
    values, indices = torch.topk(pre, k, dim=-1, sorted=False)
    indices, order = torch.sort(indices, dim=-1)
    return Codes.rectangle(values.gather(-1, order).clamp_(min=0), indices, pre.shape[1])


def through_relu(codes: Codes, code_grad: Tensor) -> Tensor:
    """Gradient of pre-activations (code,) from that of codes: a code of zero passes none."""
    return code_grad * (codes.values > 0)


def _nth_largest(pre: Tensor, n: int, guess: Tensor) -> Tensor:
    """The n-th largest of all values, or 0 where fewer than n are positive.

    `guess` costs or saves time only: where n values are above it, no others are looked at.
    """
    for low in (guess, torch.zeros_like(guess)):
        above = pre[pre > low]
        if len(above) >= n:
            return above.topk(n, sorted=False).values.min()
    return pre.new_zeros(())
