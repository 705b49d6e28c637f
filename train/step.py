"""One optimiser step, target-major: exact gradients of the joint loss, held for one layer at a time.

The loss is the sum over targets of FVU_t, the squared error over the variance. A decoder is used at its
own target only, and targets meet nowhere but in the codes; so codes are computed first, then each target
is decoded, its decoder's gradient is used up at once, and its gradient towards the codes is added; at last
each encoder gets one sparse backward pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import through_relu
from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder

Apply = Callable[[str, int, dict[str, Tensor]], None]
"""Told (kind of layer: "decoder" or "encoder", its place, gradients by parameter) once these are final."""


class StepResult(NamedTuple):
    fvu: Tensor
    """(layer,): loss by target"""
    l0: Tensor
    """(layer,): mean number of positive activations of a token"""
    fired: Tensor
    """(layer, latent) int64: tokens for which it was positive"""
    square_error: Tensor
    """(layer, token): squared error of each standardised target, over all micro-batches"""

    @property
    def loss(self) -> Tensor:
        return self.fvu.sum()


class _MicroBatch:
    """Values of one micro-batch, made from stored numbers when asked, and its codes."""

    def __init__(self, model: CrossLayerTranscoder, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.codes = {s: self._encode(s) for s in range(model.shape.n_layers)}
        self.code_grads = {s: torch.zeros_like(codes.values) for s, codes in self.codes.items()}

    def inputs(self, layer: int) -> Tensor:
        mean = self.model.inputs.mean
        return self.model.inputs.apply_to(self.batch.values("mlp_in", layer, mean.device, mean.dtype), layer)

    def targets(self, layer: int) -> Tensor:
        mean = self.model.outputs.mean
        return self.model.outputs.apply_to(
            self.batch.values("mlp_out", layer, mean.device, mean.dtype), layer
        )

    def _encode(self, source: int) -> Codes:
        return self.model.encode_layer(self.inputs(source), source)


@torch.no_grad()
def train_step(
    model: CrossLayerTranscoder, batches: Sequence[Batch], apply: Apply, variance: str = "cache"
) -> StepResult:
    """Gradients of sum_t FVU_t over all micro-batches together, handed to `apply` layer by layer.

    variance "cache": the standardised variance, d_model; "batch": that of the step's own targets.
    """
    parts = [_MicroBatch(model, batch) for batch in batches]
    layers = range(model.shape.n_layers)
    fvu, errors = zip(*(_target(model, parts, target, apply, variance) for target in layers), strict=True)
    for source in layers:
        _source(model, parts, source, apply)
    tokens = sum(len(part.batch) for part in parts)
    l0 = torch.stack([sum(((p.codes[s].values > 0).sum() for p in parts), torch.tensor(0)) for s in layers])
    fired = torch.stack([_fired(parts, s) for s in layers])
    return StepResult(torch.stack(fvu), l0 / tokens, fired, torch.stack(errors))


def _target(
    model: CrossLayerTranscoder, parts: list[_MicroBatch], target: int, apply: Apply, variance: str
) -> tuple[Tensor, Tensor]:
    """Decode one target, use up its gradients, and add what it wants of its sources' codes.

    Its FVU, and the squared error of each token.
    """
    weight = model.W_dec[target]
    wanted = [part.targets(target) for part in parts]
    scale = 1 / _total_variance(wanted, variance)
    grads = {"W_dec": torch.empty_like(weight), "b_dec": torch.zeros_like(model.b_dec[target])}
    errors = []
    for number, (part, truth) in enumerate(zip(parts, wanted, strict=True)):
        error = model.decode_layer(part.codes, target) - truth
        errors.append(error.square().sum(dim=1))
        grad = error.mul_(2 * scale)
        grads["b_dec"] += grad.sum(dim=0)
        for place, source in enumerate(model.shape.sources(target)):
            codes = part.codes[source]
            part.code_grads[source] += codes.code_grad(grad, weight[place])
            change = codes.weight_grad(grad)
            if number == 0:
                grads["W_dec"][place] = change
            else:
                grads["W_dec"][place] += change
    apply("decoder", target, grads)
    per_token = torch.cat(errors)
    return per_token.sum() * scale, per_token


def _source(model: CrossLayerTranscoder, parts: list[_MicroBatch], source: int, apply: Apply) -> None:
    """One backward pass of one encoder, from the summed gradient of its codes."""
    total: dict[str, Tensor] = {}
    for part in parts:
        codes = part.codes[source]
        pre_grad = through_relu(codes, part.code_grads[source])
        weight, bias = codes.encoder_grad(pre_grad, part.inputs(source))
        total["W_enc"] = weight if "W_enc" not in total else total["W_enc"] + weight
        total["b_enc"] = bias if "b_enc" not in total else total["b_enc"] + bias
    apply("encoder", source, total)


def _total_variance(wanted: list[Tensor], variance: str) -> Tensor:
    """What the summed squared error is divided by."""
    tokens, width = sum(len(truth) for truth in wanted), wanted[0].shape[1]
    if variance == "cache":  # standardised targets have variance 1 a channel
        return wanted[0].new_tensor(float(tokens * width))
    mean = torch.stack([truth.sum(dim=0) for truth in wanted]).sum(dim=0) / tokens
    return torch.stack([(truth - mean).square().sum() for truth in wanted]).sum()


def _fired(parts: list[_MicroBatch], source: int) -> Tensor:
    codes = [part.codes[source] for part in parts]
    positive = torch.cat([each.columns[each.values > 0] for each in codes])
    return torch.bincount(positive, minlength=codes[0].n_latents)
