"""The joint loss of a transcoder, dense and in one autograd graph: every definition written out, slowly."""

from typing import Any

import torch
from torch import Tensor

from clt.train.losses import Extras
from clt.train.reader import Batch
from clt.train.transcoder import CrossLayerTranscoder


class JumpReLU(torch.autograd.Function):
    """x where x > exp(t); d/dt is -exp(t) / width where x is within width / 2 of exp(t)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.width = width
        return x * (x > t.exp())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, t = ctx.saved_tensors
        theta, grad = t.exp(), grads[0]
        inside = (x - theta).abs() < ctx.width / 2
        return grad * (x > theta), (grad * inside * -theta / ctx.width).sum(dim=0), None


def dense_activations(model: CrossLayerTranscoder, pre: Tensor, source: int, k: int) -> Tensor:
    """Of all tokens of a step, (token, latent)."""
    name, positive = model.shape.activation, torch.relu(pre)
    if name == "topk":
        return positive * (positive >= positive.topk(k, dim=1).values[:, -1:])
    if name == "batchtopk":
        return positive * (positive >= positive.flatten().topk(k * len(pre)).values[-1])
    if name == "groupmax":
        groups = positive.unflatten(1, (k, -1))
        return (groups * (groups == groups.max(dim=2, keepdim=True).values)).flatten(1)
    if name == "relu":
        return positive
    out: Tensor = JumpReLU.apply(pre, model.log_threshold[source], model.shape.bandwidth)
    return out


def decoder(model: CrossLayerTranscoder, s: int, t: int) -> Tensor:
    tied = {"source": model.W_dec[s], "target": model.W_dec[t]}
    first = max(0, t - model.shape.n_targets + 1)
    return model.W_dec[t][s - first] if model.shape.tie == "none" else tied[model.shape.tie]


def dense_loss(
    model: CrossLayerTranscoder, batch: Batch, variance: str = "cache", extras: Extras | None = None
) -> dict[str, Tensor]:
    """fvu, sparsity, auxk and dead_latents; their sum is what a step descends."""
    extras, shape, n = extras or Extras(), model.shape, len(batch)
    cpu, layers = torch.device("cpu"), range(model.shape.n_layers)

    def standard(site: str, layer: int) -> Tensor:
        scale = model.inputs if site == "mlp_in" else model.outputs
        return (batch.values(site, layer, cpu, torch.float64) - scale.mean[layer]) / scale.scale[layer]

    dead = extras.dead if extras.dead is not None else torch.zeros(len(layers), shape.n_latents).bool()
    losses = {
        name: torch.zeros((), dtype=torch.float64) for name in ("fvu", "sparsity", "auxk", "dead_latents")
    }
    codes, dead_codes = [], []
    for s in layers:
        pre = standard("mlp_in", s) @ model.W_enc[s].T + model.b_enc[s]
        k = (extras.k or shape.layer_k or [0] * len(layers))[s]
        codes.append(dense_activations(model, pre, s, k))
        targets = [t for t in layers if s <= t < s + shape.n_targets]
        norm = torch.cat([decoder(model, s, t) for t in targets], dim=1).norm(dim=1)
        bend = torch.tanh(4 * codes[s] * norm) if shape.activation == "jumprelu" else codes[s] * norm
        losses["sparsity"] = losses["sparsity"] + extras.sparsity * bend.sum() / n
        theta = model.log_threshold[s].exp() if shape.activation == "jumprelu" else 0.0
        push = (torch.relu(theta - pre) * norm)[:, dead[s]]
        losses["dead_latents"] = losses["dead_latents"] + extras.dead_latents * push.sum() / n
        only = torch.relu(pre).masked_fill(~dead[s], -1)
        kth = only.topk(max(1, min(shape.d_model // 2, int(dead[s].sum()))), dim=1).values[:, -1:]
        dead_codes.append(torch.relu(only) * (only >= kth))
    for t in layers:
        y, sources = standard("mlp_out", t), [s for s in layers if t - shape.n_targets < s <= t]
        predicted = model.b_dec[t] + sum(codes[s] @ decoder(model, s, t) for s in sources)
        if shape.skip:
            predicted = predicted + standard("mlp_in", t) @ model.W_skip[t].T
        total = (
            len(y) * model.outputs.variance[t] if variance == "cache" else (y - y.mean(dim=0)).square().sum()
        )
        losses["fvu"] = losses["fvu"] + (y - predicted).square().sum() / total
        rebuilt = sum(dead_codes[s] @ decoder(model, s, t) for s in sources)
        share = min(1.0, float(dead[sources].sum()) / (shape.d_model // 2))
        left = ((y - predicted).detach() - rebuilt).square().sum() / total
        losses["auxk"] = losses["auxk"] + extras.auxk * share * left
    return losses
