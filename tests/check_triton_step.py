"""Run by test_train_triton.py in a process of its own: whole steps with Triton's kernels, interpreted."""

from dataclasses import replace

import torch
from tiny_transcoder import SHAPE, make_batch, make_model
from torch import Tensor

from clt.train import sparse, transcoder
from clt.train.losses import Extras
from clt.train.shape import Shape
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, Standardiser

used: list[str] = []
SMALL = replace(SHAPE, layers=(0, 1, 2), d_model=8, n_latents=9, k=2, n_targets=2)
DEAD = Extras(auxk=0.03, dead=torch.arange(9).expand(3, 9) % 3 == 0)


def model_in(shape: Shape, dtype: torch.dtype) -> CrossLayerTranscoder:
    """Of the numbers of `make_model`, rounded to dtype where matrices are kept in it."""
    wide = make_model(shape)
    sites = [Standardiser(s.mean.float(), s.scale.float()) for s in (wide.inputs, wide.outputs)]
    model = CrossLayerTranscoder(shape, sites[0], sites[1], dtype=dtype)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), wide.parameters(), strict=True):
            mine.copy_(other)
    return model


def gradients(model: CrossLayerTranscoder, extras: Extras) -> dict[tuple[str, int], Tensor]:
    found: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        found.update({(name, layer): grad.clone() for name, grad in grads.items()})

    train_step(model, [make_batch(n, n, SMALL) for n in (4, 3)], keep, extras=extras)
    return found


def on_kernels(tensor: Tensor) -> bool:
    used.append(str(tensor.dtype))
    return True


def check(tie: str, activation: str, dtype: torch.dtype, most: float) -> None:
    """Against the step without kernels, by norm; twice, for the same bits."""
    shape = replace(SMALL, tie=tie, activation=activation)
    expected = gradients(model_in(shape, dtype), DEAD)
    plain = sparse.on_triton
    sparse.on_triton = transcoder.on_triton = on_kernels
    found, again = (gradients(model_in(shape, dtype), DEAD) for _ in range(2))
    sparse.on_triton = transcoder.on_triton = plain
    for key, grad in expected.items():
        assert found[key].dtype == torch.float32
        assert float((found[key] - grad).norm() / grad.norm()) < most, (tie, dtype, key)
        assert torch.equal(found[key], again[key]), key


check("none", "topk", torch.float32, 1e-5)
check("target", "batchtopk", torch.bfloat16, 2e-2)
assert {"torch.float32", "torch.bfloat16"} <= set(used)
print("equal")
