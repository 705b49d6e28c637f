"""NaN and infinity stop a run before they reach a checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .transcoder import CrossLayerTranscoder


class NotFiniteError(ValueError):
    """Says which layer's loss, gradient or weight is NaN or infinite."""


class DivergedError(ValueError):
    """Says of a run that it is given up for that, and what is left of it."""


def require_finite_loss(fvu: Tensor, layers: Iterable[int]) -> None:
    """fvu: (layer,)"""
    bad = [layer for layer, fine in zip(layers, torch.isfinite(fvu).tolist(), strict=True) if not fine]
    if bad:
        raise NotFiniteError(f"the loss is not finite in layer {', '.join(map(str, bad))}")


def require_finite_weights(model: CrossLayerTranscoder) -> None:
    bad = []
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            kind, place = name.rsplit(".", 1)
            bad.append(f"{kind} of layer {model.shape.layers[int(place)]}")
    if bad:
        raise NotFiniteError(f"weights are not finite: {', '.join(bad)}")
