"""The step on shapes drawn at random, against dense autograd: values and gradients, in float64."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_reference import dense_loss
from tiny_transcoder import joined, make_batch, make_model
from torch import Tensor

from clt.train import cpu_codes
from clt.train.config import ACTIVATIONS, TIES, WITH_K
from clt.train.losses import Extras
from clt.train.shape import Shape
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, Standardiser


def any_shape(draw: random.Random) -> Shape:
    """One to five layers, some far apart; k up to all latents; n_targets beyond the last layer."""
    layers, groups = draw.randint(1, 5), draw.randint(1, 4)
    latents, name = groups * draw.randint(1, 12), draw.choice(ACTIVATIONS)
    k: int | tuple[int, ...] | None = draw.randint(1, latents) if name in WITH_K else None
    if name in ("topk", "batchtopk") and draw.random() < 0.4:
        k = tuple(draw.randint(1, latents) for _ in range(layers))
    return Shape(
        tuple(sorted(draw.sample(range(20), layers))),
        d_model=draw.choice([2, 5, 16, 33]),
        n_latents=latents,
        k=groups if name == "groupmax" else k,
        n_targets=draw.randint(1, 7),
        tie=draw.choice(TIES),
        skip=draw.random() < 0.5,
        activation=name,
        bandwidth=draw.choice([0.1, 1.0, 3.0]) if name == "jumprelu" else None,
    )


def any_extras(draw: random.Random, shape: Shape) -> Extras:
    dead = torch.rand(shape.n_layers, shape.n_latents) < draw.random()
    return Extras(
        sparsity=0.02 if shape.activation not in WITH_K else 0.0,
        auxk=draw.choice([0.0, 0.03]),
        dead_latents=draw.choice([0.0, 0.01]),
        dead=dead if draw.random() < 0.7 else None,
    )


def in_float32(model: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same numbers, rounded; the model gets them too, so that both compute with the same."""
    sites = [Standardiser(s.mean.float(), s.scale.float()) for s in (model.inputs, model.outputs)]
    single = CrossLayerTranscoder(model.shape, sites[0], sites[1])
    for mine, wide in zip(single.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(wide)
        wide.copy_(mine)
    return single


@pytest.mark.parametrize("seed", range(0, 40, 2))
@pytest.mark.parametrize("compiled", [False, True])
def test_any_shape_in_float32(compiled: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled loops, where they are, and without: the gradients of float64, to rounding."""
    monkeypatch.setattr(cpu_codes, "COMPILED", compiled and cpu_codes.COMPILED)
    draw = random.Random(seed)
    shape = replace(any_shape(draw), d_model=draw.choice([5, 64, 130]))
    model = make_model(shape, seed)
    single = in_float32(model)
    parts = [make_batch(draw.randint(2, 9), draw.randint(0, 99), shape) for _ in range(draw.randint(1, 3))]
    extras = any_extras(draw, shape)
    found: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        found.update({(name, layer): grad.clone() for name, grad in grads.items()})

    result = train_step(single, parts, keep, extras=extras)
    losses: dict[str, Any] = dense_loss(model, joined(parts), "cache", extras)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert float(result.loss) == pytest.approx(total.item(), rel=1e-4)
    for (name, layer), grad in found.items():
        expected = getattr(model, name)[layer].grad
        expected = torch.zeros_like(grad) if expected is None else expected
        assert (grad - expected).norm() <= 1e-3 * max(float(expected.norm()), 1e-4), (name, layer)


@pytest.mark.parametrize("seed", range(40))
def test_any_shape_equals_dense_autograd(seed: int) -> None:
    """One to three micro-batches of 2 to 9 tokens."""
    draw = random.Random(seed)
    shape = any_shape(draw)
    model = make_model(shape, seed)
    parts = [make_batch(draw.randint(2, 9), draw.randint(0, 99), shape) for _ in range(draw.randint(1, 3))]
    extras, variance = any_extras(draw, shape), draw.choice(["cache", "batch"])
    found: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        found.update({(name, layer): grad.clone() for name, grad in grads.items()})

    result = train_step(model, parts, keep, variance, extras)
    losses: dict[str, Any] = dense_loss(model, joined(parts), variance, extras)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert float(result.loss) == pytest.approx(total.item(), rel=1e-9)
    assert len(found) == len(list(model.parameters()))
    for (name, layer), grad in found.items():
        expected = getattr(model, name)[layer].grad
        expected = torch.zeros_like(grad) if expected is None else expected
        assert (grad - expected).abs().max() <= 1e-8 * max(float(expected.abs().max()), 1e-6), (name, layer)
