"""One optimiser step, a layer at a time: once a layer's gradients are final, its weights change and they go.

The rule that turns a gradient into a change is chosen by name (`rule_for`). No rule has weight decay. A
weight in bfloat16 is changed in float32, piece by piece, and rounded stochastically.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .adam import Adam, State
from .adam8 import Adam8
from .finite import NotFiniteError
from .momentum import Muon, Signum
from .rounding import round_into, seeded_generator
from .transcoder import CrossLayerTranscoder

SMALL = 4096
"""Tensors of fewer values keep float32 state under adam8, as in bitsandbytes."""


class Rule(Protocol):
    def new_state(self, weight: Tensor) -> State:
        """State of one tensor before its first step."""

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        """Views that can be updated one after the other, so that temporaries stay small."""

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        """Change a piece and its state in place; step 1 is the first. weight, grad: float32 or float64."""


def rule_for(optimizer: str, weight: Tensor, compiled: bool = False) -> Rule:
    """What `--optimizer` does with a tensor of this shape; compiled: where that is faster, for adam8."""
    if optimizer == "adam8" and weight.numel() >= SMALL:
        return Adam8(compiled)
    if optimizer == "muon" and weight.ndim >= 2:
        return Muon()
    if optimizer == "signum":
        return Signum()
    return Adam()


class Optimizer:
    """State of every parameter of a transcoder, by name and layer."""

    def __init__(
        self,
        model: CrossLayerTranscoder,
        name: str,
        seed: int = 0,
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        self._model, self._name, self._seed, self._max_grad_norm = model, name, seed, max_grad_norm
        self._compiled = compiled
        self._states: dict[tuple[str, int], State] = {}
        self._step, self._lr = 0, 0.0
        self._square_norms: list[Tensor] = []

    def begin(self, step: int, lr: float) -> None:
        """Start step 0, 1, ...; its number drives Adam's bias correction and the noise of rounding."""
        self._step, self._lr, self._square_norms = step, lr, []

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients since `begin`, before clipping."""
        return float(torch.stack(self._square_norms).sum().sqrt())

    def apply(self, side: str, layer: int, grads: dict[str, Tensor]) -> None:
        """Update one layer's parameters, W_dec[layer] and so on, with their final gradients, scaled in place.

        Raises NotFiniteError, and changes nothing, where a gradient is not finite. Gradients whose norm is
        above `max_grad_norm` are scaled down: the norm of these gradients, one decoder's or one encoder's,
        because that of all is known only when the first layers' gradients are gone.
        """
        norms = [torch.linalg.vector_norm(grad).double() for grad in grads.values()]
        square = torch.stack(norms).square().sum()
        self._square_norms.append(square)
        if not torch.isfinite(square):
            place = self._model.shape.layers[layer]
            raise NotFiniteError(f"the loss, or its gradient, is not finite in layer {place} ({side})")
        scale = 1.0
        if self._max_grad_norm is not None:
            scale = min(1.0, self._max_grad_norm / max(float(square) ** 0.5, 1e-30))
        for name, grad in grads.items():
            self._update(name, layer, grad if scale == 1.0 else grad.mul_(scale))

    def _update(self, name: str, layer: int, grad: Tensor) -> None:
        weight = getattr(self._model, name)[layer].data
        rule, state = self._rule(weight), self.state_of(name, layer)
        noise = None
        if weight.dtype == torch.bfloat16:
            noise = seeded_generator(weight.device, self._seed, self._step, name, layer)
        for part, part_grad, part_state in rule.pieces(weight, grad, state):
            work = part.to(torch.promote_types(part.dtype, torch.float32))
            rule.update(work, part_grad.to(work.dtype), part_state, self._lr, self._step + 1)
            if noise is not None:
                round_into(part, work, noise)

    def state_of(self, name: str, layer: int) -> State:
        """That of one parameter; before its first step a new one."""
        if not (state := self._states.get((name, layer), {})):
            weight = getattr(self._model, name)[layer].data
            state = self._rule(weight).new_state(weight)
            self._states[name, layer] = state
        return state

    def set_state(self, name: str, layer: int, state: State) -> None:
        """The same numbers in other memory."""
        self._states[name, layer] = state

    def _rule(self, weight: Tensor) -> Rule:
        return rule_for(self._name, weight, self._compiled)

    def state(self, layer: int) -> dict[str, Tensor]:
        """State of one layer's parameters, as `W_dec.<name>`; empty before the first step."""
        return {
            f"{name}.{key}": value
            for (name, at), state in self._states.items()
            if at == layer
            for key, value in state.items()
        }

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for key, value in tensors.items():
            name, part = key.rsplit(".", 1)
            self.state_of(name, layer)[part].copy_(value)


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
