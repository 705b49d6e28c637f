"""One optimiser step, target-major: exact gradients of the joint loss, held for one layer at a time.

The loss is the sum over targets of FVU_t, the squared error over the variance. A decoder is used at its
own target only, and targets meet nowhere but in the codes; so codes are computed first, then each target
is decoded, its decoder's gradient is used up at once, and its gradient towards the codes is added; at last
each encoder gets one sparse backward pass. A decoder tied by source serves n_targets targets, and is updated
after the last of them; n_targets gradients are held then.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import through_relu
from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder, Term

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

    def add_code_grads(self, term: Term, grad: Tensor, weight: Tensor) -> None:
        """What one product wants of its sources' codes."""
        codes = term.merged.codes
        if len(term.sources) == 1:
            codes.code_grad(grad, weight, out=self.code_grads[term.sources[0]])
            return
        changes = term.merged.split(codes.code_grad(grad, weight))
        for source, change in zip(term.sources, changes, strict=True):
            self.code_grads[source] += change

    def _encode(self, source: int) -> Codes:
        return self.model.encode_layer(self.inputs(source), source)


@torch.no_grad()
def train_step(
    model: CrossLayerTranscoder, batches: Sequence[Batch], apply: Apply, variance: str = "cache"
) -> StepResult:
    """Gradients of sum_t FVU_t over all micro-batches together, handed to `apply` layer by layer.

    variance "cache": that of the standardiser; "batch": that of the step's own targets.
    """
    parts = [_MicroBatch(model, batch) for batch in batches]
    layers = range(model.shape.n_layers)
    room = _Room(model)
    decoders = _DecoderGrads(model, apply, room)
    fvu, errors = zip(*(_target(model, parts, target, decoders, variance) for target in layers), strict=True)
    for source in layers:
        _source(model, parts, source, apply, room)
    tokens = sum(len(part.batch) for part in parts)
    l0 = torch.stack([sum(((p.codes[s].values > 0).sum() for p in parts), torch.tensor(0)) for s in layers])
    fired = torch.stack([_fired(parts, s) for s in layers])
    return StepResult(torch.stack(fvu), l0 / tokens, fired, torch.stack(errors))


class _Room:
    """Memory for gradients, used again and again: on a CPU new pages cost more than the products."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self.largest = max(weight.numel() for weight in (*model.W_dec, *model.W_enc))
        self.free: list[Tensor] = []

    def take(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a weight; what is in it has no meaning."""
        flat = self.free.pop() if self.free else weight.new_empty(self.largest)
        return flat[: weight.numel()].view_as(weight)

    def give_back(self, grad: Tensor) -> None:
        self.free.append(grad.new_empty(0).set_(grad.untyped_storage()))


class _DecoderGrads:
    """Gradients of the decoders that later targets still add to."""

    def __init__(self, model: CrossLayerTranscoder, apply: Apply, room: _Room) -> None:
        self.model, self.apply, self.room = model, apply, room
        self.held: dict[int, dict[str, Tensor]] = {}
        self.written: set[tuple[int, int | EllipsisType]] = set()

    def begin(self, layer: int) -> None:
        names = self.model.names("decoder")
        self.held[layer] = {name: torch.zeros_like(getattr(self.model, name)[layer]) for name in names[1:]}
        self.held[layer]["W_dec"] = self.room.take(self.model.W_dec[layer])

    def add(self, target: int, part: _MicroBatch, grad: Tensor, terms: list[Term]) -> None:
        """One micro-batch's, from `grad` (token, d_model) of the target's standardised output."""
        mine = self.held[target]
        mine["b_dec"] += grad.sum(dim=0)
        if self.model.shape.skip:
            mine["W_skip"].addmm_(grad.T, part.inputs(target))
        for term in terms:
            place, out = (term.layer, term.slot), self.held[term.layer]["W_dec"][term.slot]
            term.merged.codes.weight_grad(grad, out, add=place in self.written)
            self.written.add(place)

    def finish(self, target: int) -> None:
        """Hand over those that no target after this one adds to."""
        for layer in [held for held in self.held if self.model.shape.last_target(held) == target]:
            grads = self.held.pop(layer)
            self.apply("decoder", layer, grads)
            self.room.give_back(grads["W_dec"])


def _target(
    model: CrossLayerTranscoder, parts: list[_MicroBatch], target: int, decoders: _DecoderGrads, variance: str
) -> tuple[Tensor, Tensor]:
    """Decode one target, use up its gradients, and add what it wants of its sources' codes.

    Its FVU, and the squared error of each token.
    """
    scale = 1 / _total_variance(parts, target, variance)
    decoders.begin(target)
    errors = []
    for part in parts:
        terms = model.terms(part.codes, target)
        error = model.decode_terms(terms, target).sub_(part.targets(target))
        if model.shape.skip:
            error.addmm_(part.inputs(target), model.W_skip[target].T)
        errors.append(torch.linalg.vector_norm(error, dim=1).square_())
        grad = error.mul_(2 * scale)
        decoders.add(target, part, grad, terms)
        for term in terms:
            part.add_code_grads(term, grad, model.W_dec[term.layer][term.slot])
    decoders.finish(target)
    per_token = torch.cat(errors)
    return per_token.sum() * scale, per_token


def _source(
    model: CrossLayerTranscoder, parts: list[_MicroBatch], source: int, apply: Apply, room: _Room
) -> None:
    """One backward pass of one encoder, from the summed gradient of its codes."""
    grads = {"W_enc": room.take(model.W_enc[source]), "b_enc": torch.zeros_like(model.b_enc[source])}
    for number, part in enumerate(parts):
        codes = part.codes[source]
        pre_grad = through_relu(codes, part.code_grads[source])
        _, bias = codes.encoder_grad(pre_grad, part.inputs(source), grads["W_enc"], add=number > 0)
        grads["b_enc"] += bias
    apply("encoder", source, grads)
    room.give_back(grads["W_enc"])


def _total_variance(parts: list[_MicroBatch], target: int, variance: str) -> Tensor:
    """What the summed squared error is divided by; holds one micro-batch's targets at a time."""
    tokens = sum(len(part.batch) for part in parts)
    if variance == "cache":
        return parts[0].model.outputs.variance[target] * tokens
    mean = torch.stack([part.targets(target).sum(dim=0) for part in parts]).sum(dim=0) / tokens
    centred = (part.targets(target).sub_(mean) for part in parts)
    return torch.stack([torch.linalg.vector_norm(values).square() for values in centred]).sum()


def _fired(parts: list[_MicroBatch], source: int) -> Tensor:
    codes = [part.codes[source] for part in parts]
    positive = torch.cat([each.columns[each.values > 0] for each in codes])
    return torch.bincount(positive, minlength=codes[0].n_latents)
