"""Adam (Kingma and Ba 2015, arXiv 1412.6980), without weight decay."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

State = dict[str, Tensor]
"""Of one parameter, by name."""


def slab_size(device: torch.device) -> int:
    """Values updated together: on a CPU few enough for its cache, on a GPU enough to hide a launch."""
    return 2**23 if device.type == "cuda" else 2**20


class Adam:
    """Two moments in float32 (float64 for a float64 weight): 8 bytes a value."""

    def new_state(self, weight: Tensor) -> State:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {name: torch.zeros_like(weight, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        return slabs(weight, grad, state)

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        adam(
            [weight],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.tensor(float(step - 1), device=weight.device)],  # torch counts before it updates
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


def slabs(weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Flat stretches of a tensor and of state that has one value for each of its values."""
    values, grads = weight.view(-1), grad.reshape(-1)
    size = slab_size(weight.device)
    for start in range(0, len(values), size):
        here = slice(start, start + size)
        yield values[here], grads[here], {name: tensor.view(-1)[here] for name, tensor in state.items()}
