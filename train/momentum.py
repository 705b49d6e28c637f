"""Rules that keep one average of the gradients: signum and Muon. 4 bytes a value."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .adam import State, slabs

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, X X^T X and X (X^T X)^2 that drive every singular value to near 1 (Jordan 2024)."""
NEWTON_SCHULZ_STEPS = 5


def _new_average(weight: Tensor) -> State:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {"average": torch.zeros_like(weight, dtype=dtype)}


class Signum:
    """Every value moves by lr, against its averaged gradient's sign (Bernstein et al. 2018, 1802.04434)."""

    def new_state(self, weight: Tensor) -> State:
        return _new_average(weight)

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        return slabs(weight, grad, state)

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        average = state["average"].lerp_(grad, 1 - MOMENTUM)
        weight.sub_(average.sign(), alpha=lr)


class Muon:
    """A matrix's averaged gradient (Nesterov), made orthogonal (Jordan 2024, kellerjordan.github.io).

    A tensor (..., rows, columns) is a stack of matrices. The change is lr * 0.2 * sqrt(max(rows, columns))
    times the orthogonal matrix, about as large as Adam's would be (Liu et al. 2025, arXiv 2502.16982).
    """

    def new_state(self, weight: Tensor) -> State:
        return _new_average(weight)

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        stack = (-1, *weight.shape[-2:])
        average = state["average"].view(stack)
        for place, (matrix, its_grad) in enumerate(zip(weight.view(stack), grad.reshape(stack), strict=True)):
            yield matrix, its_grad, {"average": average[place]}

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        average = state["average"].lerp_(grad, 1 - MOMENTUM)
        direction = orthogonalised(grad.lerp(average, MOMENTUM))
        weight.sub_(direction, alpha=lr * 0.2 * max(weight.shape) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of the matrix U S V^T, roughly: singular values that are not tiny end between 0.7 and 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (torch.linalg.vector_norm(wide) + torch.finfo(wide.dtype).tiny)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T
