"""Codes (the active latents of each token) and the three products a transcoder needs of them.

With A (token, latent) the codes as a matrix: decode A @ W; weight gradient A^T @ G; code gradient (G W^T)
at A's places. The transpose is built once for a source and serves all its targets; cost grows with the number
of codes, not with the number of latents.

In float32 on a CPU loops in C do them (`cpu_codes`; a bfloat16 weight is made float32 first), on CUDA
Triton's kernels (`triton_codes`). Elsewhere torch's sparse matrices in CSR form do, and its bags for
narrow rows.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import cpu_codes
from .cpu_codes import Tiles, is_compiled

with warnings.catch_warnings():  # torch says once a process that CSR is in beta; nobody can act on it
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)

NARROW = 1024
"""Rows of up to so many values are summed faster by torch's embedding_bag than by a CSR product."""


class Codes:
    """The codes of one source for one micro-batch; any number a token, and zeros may be among them.

    `starts` (token + 1,) int32: where each token's codes begin, the last is their number;
    `columns` (code,) int32: latents, ascending in each token; `values` (code,): activations, not negative.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, n_latents: int) -> None:
        self.starts, self.columns, self.values = starts, columns, values
        self.n_latents = n_latents
        self.width: int | None = None
        """Codes of each token, where it is known that all have as many"""

    @classmethod
    def rectangle(cls, values: Tensor, indices: Tensor, n_latents: int) -> "Codes":
        """The same number for each token: both (token, k), indices ascending in each row."""
        tokens, k = values.shape
        starts = torch.arange(tokens + 1, dtype=torch.int32, device=values.device) * k
        codes = cls(starts, indices.flatten().int(), values.flatten(), n_latents)
        codes.width = k
        return codes

    @classmethod
    def at(cls, places: Tensor, values: Tensor) -> "Codes":
        """Codes wherever `places` (token, latent) is True; values (token, latent)."""
        starts = torch.zeros(len(places) + 1, dtype=torch.int32, device=places.device)
        starts[1:] = places.sum(dim=1).cumsum(0)
        columns = places.nonzero()[:, 1]
        return cls(starts, columns.int(), values[places], places.shape[1])

    @property
    def n_tokens(self) -> int:
        return len(self.starts) - 1

    def dense(self) -> Tensor:
        """(token, latent)."""
        out = self.values.new_zeros(self.n_tokens, self.n_latents)
        return out.index_put_((self.tokens, self.columns), self.values, accumulate=True)

    def where(self, kept: Tensor) -> "Codes":
        """The codes for which `kept` (code,) is True."""
        before = torch.zeros(len(kept) + 1, dtype=torch.int32, device=kept.device)
        before[1:] = kept.cumsum(0)
        return Codes(before[self.starts], self.columns[kept], self.values[kept], self.n_latents)

    def decode(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """A @ weight: (latent, d) -> (token, d); added to `out` where that is given."""
        if is_compiled(weight):
            out = weight.new_zeros(self.n_tokens, weight.shape[1]) if out is None else out
            cpu_codes.decode((self.starts, self.columns, self.values), weight, out)
            return out
        return _product(self._matrix, weight, out, add=True)

    def weight_grad(self, grad: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        """A^T @ grad: (token, d) -> (latent, d), written to `out`, or added to it."""
        return _product(self._transposed_matrix, grad, out, add)

    def code_grad(self, grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """For each code, its latent's row of weight times its token's row of grad; added to `out` (code,)."""
        out = torch.zeros_like(self.values) if out is None else out
        places = _csr(self.starts, self.columns, out, self._size)  # shares the memory of `out`
        torch.sparse.sampled_addmm(places, grad, weight.T, out=places)
        return out

    def gradients(
        self, grad: Tensor | Tiles, weight: Tensor, weight_grad: Tensor, code_grad: Tensor, *, add: bool
    ) -> None:
        """`weight_grad`, written or added, and `code_grad`, added; grad: as `rows_of` gives it.

        Kernels read each row of grad once for both.
        """
        if isinstance(grad, Tiles):
            order, written = self.by_latent_order, {"weight": weight, "code_grad": code_grad}
            cpu_codes.gradients(order, self.values, grad, weight_grad, add=add, **written)
        elif on_triton(grad):
            from .triton_codes import both_gradients

            values = self._transposed_matrix.values()
            both_gradients(self.by_latent_order, values, grad, weight, weight_grad, code_grad, add=add)
        else:
            self.weight_grad(grad, weight_grad, add=add)
            self.code_grad(grad, weight, code_grad)

    def encoder_grad(
        self, pre_grad: Tensor, inputs: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encoder weight (latent, d) and bias (latent,) gradients, from that of pre-activations (code,)."""
        if is_compiled(inputs):
            weight = inputs.new_empty(self.n_latents, inputs.shape[1]) if out is None else out
            add = add and out is not None
            cpu_codes.gradients(self.by_latent_order, pre_grad, cpu_codes.tiled(inputs), weight, add=add)
        else:
            weight = _product(self._transposed(pre_grad), inputs, out, add)
        return weight, self.by_latent(pre_grad)

    def by_latent(self, values: Tensor) -> Tensor:
        """Sum over the codes of each latent: (code,) -> (latent,)."""
        if on_triton(values):  # index_add_ there adds in an order that changes from run to run
            ones = values.new_ones(self.n_tokens, 1)
            return _product(self._transposed(values), ones, None, add=False)[:, 0]
        return values.new_zeros(self.n_latents).index_add_(0, self.columns, values)

    @property
    def tokens(self) -> Tensor:
        """(code,) int64: the token of each; made anew, for it would take more room than the codes."""
        numbers = torch.arange(self.n_tokens, device=self.starts.device)
        return numbers.repeat_interleave(self.starts.diff(), output_size=len(self.columns))

    @property
    def _size(self) -> tuple[int, int]:
        return (self.n_tokens, self.n_latents)

    @cached_property
    def _matrix(self) -> Tensor:
        return _csr(self.starts, self.columns, self.values, self._size)

    @cached_property
    def by_latent_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose's row starts and columns, and the order that sorts codes by latent; all int32."""
        if cpu_codes.COMPILED and not self.columns.is_cuda:
            return cpu_codes.transpose(self.starts, self.columns, self.n_latents)
        order = torch.argsort(self.columns, stable=True)
        counts = torch.bincount(self.columns, minlength=self.n_latents)
        starts = torch.zeros(self.n_latents + 1, dtype=torch.int32, device=order.device)
        starts[1:] = counts.cumsum(0)
        return starts, self.tokens[order].int(), order.int()

    @cached_property
    def _transposed_matrix(self) -> Tensor:
        return self._transposed(self.values)

    def _transposed(self, values: Tensor) -> Tensor:
        starts, columns, order = self.by_latent_order
        return _csr(starts, columns, values.index_select(0, order), self._size[::-1])


class Merged(NamedTuple):
    """Codes of several sources as one matrix, for a decoder that they share."""

    codes: Codes
    """Each token's codes, source after source; a latent may come once for each source"""
    places: tuple[Tensor | slice, ...]
    """by source: where its codes lie among these"""
    parts: tuple[Codes, ...]

    def decode(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """As `Codes.decode`."""
        if not is_compiled(weight):
            return self.codes.decode(weight, out)
        for part in self.parts:  # loops want ascending latents
            out = part.decode(weight, out)
        assert out is not None
        return out

    def gradients(
        self, grad: Tensor | Tiles, weight: Tensor, weight_grad: Tensor, *, add: bool
    ) -> list[Tensor]:
        """`weight_grad`, written or added; by source, the gradients of its own codes."""
        if isinstance(grad, Tiles) or on_triton(grad):
            found = torch.zeros_like(self.codes.values)
            self.codes.gradients(grad, weight, weight_grad, found, add=add)
            return self.split(found)
        self.codes.weight_grad(grad, weight_grad, add=add)
        return [part.code_grad(grad, weight) for part in self.parts]  # torch's CSR has a place once at most

    def split(self, values: Tensor) -> list[Tensor]:
        """By source, the values that belong to its own codes: (code,) each."""
        return [values[place] for place in self.places]


def merge(parts: Sequence[Codes]) -> Merged:
    """The sum of the parts' matrices."""
    if len(parts) == 1:
        return Merged(parts[0], (slice(None),), tuple(parts))
    starts = torch.stack([part.starts for part in parts]).sum(dim=0, dtype=torch.int32)
    columns = torch.cat([part.columns for part in parts])
    values = torch.cat([part.values for part in parts])
    places, ahead = [], starts[:-1].clone()  # where each token's codes of the next part begin
    for part in parts:
        own = torch.arange(len(part.columns), device=starts.device)
        places.append((ahead - part.starts[:-1])[part.tokens] + own)
        ahead += part.starts.diff()
    order = torch.empty_like(columns, dtype=torch.int64)
    order[torch.cat(places)] = torch.arange(len(columns), device=starts.device)
    merged = Codes(starts, columns[order], values[order], parts[0].n_latents)
    return Merged(merged, tuple(places), tuple(parts))


def rows_of(grad: Tensor, weight: Tensor) -> Tensor | Tiles:
    """Gradient rows (token, d) as `gradients` wants them for weights like this one, in what it is kept in."""
    return cpu_codes.tiled(grad) if is_compiled(weight) and is_compiled(grad) else grad.to(weight.dtype)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    matrix: Tensor = torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)
    return matrix


def on_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels do the products: on CUDA, below float64, if Triton is there."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and find_spec("triton") is not None


def _product(matrix: Tensor, dense: Tensor, out: Tensor | None, add: bool) -> Tensor:
    """matrix @ dense, written to `out` or added to it; on a CPU new pages cost more than the product."""
    if out is None:
        out, add = dense.new_empty(matrix.shape[0], dense.shape[1]), False
    if on_triton(dense):
        from .triton_codes import sum_rows

        sum_rows(matrix.crow_indices(), matrix.col_indices(), matrix.values(), dense, out, add=add)
        return out
    if dense.shape[1] <= NARROW and not dense.is_cuda and matrix.col_indices().numel():
        starts, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
        sums = embedding_bag(columns, dense, starts[:-1], per_sample_weights=values, mode="sum")
        return out.add_(sums) if add else out.copy_(sums)
    return torch.addmm(out, matrix, dense, beta=float(add), out=out)
