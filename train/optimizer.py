"""Adam for one layer at a time, and the learning rate as a function of the optimiser step."""

import math
from typing import Any

import torch
from torch import Tensor

from .transcoder import CrossLayerTranscoder

SIDES = ("decoder", "encoder")


class LayerwiseAdam:
    """torch's Adam, one instance for each decoder and each encoder, so that gradients can go at once."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self._model = model
        self._lr = 0.0
        self._adams = {
            (side, layer): torch.optim.Adam(
                [getattr(model, name)[layer] for name in model.names(side)], lr=1.0, fused=True
            )
            for side in SIDES
            for layer in range(model.shape.n_layers)
        }
        self.square_norm = 0.0
        """Squared norm of all gradients since `begin`."""

    def begin(self, lr: float) -> None:
        """Start a step."""
        self._lr, self.square_norm = lr, 0.0

    def apply(self, side: str, layer: int, grads: dict[str, Tensor]) -> None:
        """Update one layer's parameters with their final gradients."""
        adam = self._adams[side, layer]
        for name, grad in grads.items():
            getattr(self._model, name)[layer].grad = grad
            self.square_norm += float(torch.linalg.vector_norm(grad)) ** 2
        adam.param_groups[0]["lr"] = self._lr
        adam.step()
        adam.zero_grad(set_to_none=True)

    def state(self, layer: int) -> dict[str, Tensor]:
        """Moments of one layer's parameters; empty before the first step."""
        tensors = {}
        for side in SIDES:
            state = self._adams[side, layer].state_dict()["state"]
            for place, name in enumerate(self._model.names(side)):
                for key, value in state.get(place, {}).items():
                    tensors[f"{name}.{key}"] = value
        return tensors

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        for side in SIDES:
            adam = self._adams[side, layer]
            state: dict[int, dict[str, Any]] = {
                place: {
                    key.removeprefix(f"{name}."): value
                    for key, value in tensors.items()
                    if key.startswith(f"{name}.")
                }
                for place, name in enumerate(self._model.names(side))
            }
            adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})


def learning_rate(step: int, base: float, warmup: int, total: int, schedule: str) -> float:
    """Rate of optimiser step 0, 1, ..., total - 1: linear warm-up, then `schedule`; never 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)  # 1 at the end of the warm-up, 1/total at the last step
    if schedule == "linear":
        return base * left
    if schedule == "cosine":
        return base * 0.5 * (1 - math.cos(math.pi * left))
    return base
