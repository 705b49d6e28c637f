"""Codes (k active latents a token) and the three products a transcoder needs of them.

With A (token, latent) the codes as a matrix: decode A @ W; weight gradient A^T @ G; code gradient (G W^T)
at A's places. Each is done with sparse matrices in CSR form, whose transpose is built once for a source
and serves all its targets; cost grows with k, not with the number of latents.
"""

import warnings
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

with warnings.catch_warnings():  # torch says once a process that CSR is in beta; nobody can act on it
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


class TopK(NamedTuple):
    values: Tensor
    """(token, k): activations, not negative"""
    indices: Tensor
    """(token, k): latents, ascending in each row"""


def top_k(pre: Tensor, k: int) -> TopK:
    """The k largest of relu(pre), (token, latent); where fewer are positive the rest are zeros."""
    values, indices = torch.topk(pre, k, dim=-1, sorted=False)
    indices, order = torch.sort(indices, dim=-1)
    return TopK(values.gather(-1, order).clamp_(min=0), indices)


class Codes:
    """The codes of one source for one micro-batch."""

    def __init__(self, codes: TopK, n_latents: int) -> None:
        self.values, self.indices = codes
        self.n_latents = n_latents

    def decode(self, weight: Tensor) -> Tensor:
        """A @ weight: (latent, d) -> (token, d)."""
        return torch.matmul(self._matrix, weight)

    def weight_grad(self, grad: Tensor) -> Tensor:
        """A^T @ grad: (token, d) -> (latent, d)."""
        return self._transposed(self.values) @ grad

    def code_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """For each code, its latent's row of weight times its token's row of grad: (token, k)."""
        places = _csr(*self._rows, torch.zeros_like(self.values).flatten(), self._size)
        products = torch.sparse.sampled_addmm(places, grad, weight.T)
        found: Tensor = products.values()
        return found.view_as(self.values)

    def encoder_grad(self, code_grad: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of encoder weight (latent, d) and bias (latent,); an inactive latent gets none."""
        active = code_grad * (self.values > 0)
        bias = torch.zeros(self.n_latents, dtype=active.dtype, device=active.device)
        bias.index_add_(0, self.indices.flatten(), active.flatten())
        return self._transposed(active) @ inputs, bias

    @property
    def _size(self) -> tuple[int, int]:
        return (len(self.values), self.n_latents)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """CSR's row starts and columns."""
        tokens, k = self.values.shape
        starts = torch.arange(0, tokens * k + 1, k, dtype=torch.int32, device=self.values.device)
        return starts, self.indices.flatten().int()

    @cached_property
    def _matrix(self) -> Tensor:
        return _csr(*self._rows, self.values.flatten(), self._size)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose's row starts and columns, and the order that sorts codes by latent."""
        flat = self.indices.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.n_latents)
        starts = torch.zeros(self.n_latents + 1, dtype=torch.int32, device=flat.device)
        starts[1:] = counts.cumsum(0)
        return starts, (order // self.values.shape[1]).int(), order

    def _transposed(self, values: Tensor) -> Tensor:
        starts, columns, order = self._by_latent
        return _csr(starts, columns, values.flatten()[order], self._size[::-1])


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    matrix: Tensor = torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)
    return matrix
