"""Activations: which latents are active for a token, and how gradients pass them."""

import torch
from torch import Tensor

from .sparse import Codes


def top_k(pre: Tensor, k: int) -> Codes:
    """The k largest of relu(pre), (token, latent); where fewer are positive the rest are zeros."""
    values, indices = torch.topk(pre, k, dim=-1, sorted=False)
    indices, order = torch.sort(indices, dim=-1)
    return Codes.rectangle(values.gather(-1, order).clamp_(min=0), indices, pre.shape[1])


def through_relu(codes: Codes, code_grad: Tensor) -> Tensor:
    """Gradient of pre-activations (code,) from that of codes: a code of zero passes none."""
    return code_grad * (codes.values > 0)
