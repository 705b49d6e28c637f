"""One optimiser step, target-major: exact gradients of the joint loss, held for one layer at a time.

The loss is the sum over targets of FVU_t, the squared error over the variance. A decoder is used at its
own target only, and targets meet nowhere but in the codes; so codes are computed first, then each target
is decoded, its decoder's gradient is used up at once, and its gradient towards the codes is added; at last
each encoder gets one sparse backward pass. A decoder tied by source serves n_targets targets, and is updated
after the last of them; n_targets gradients are held then.

Where layers are spread over processes, each does this for its own, and between the three parts codes and
their gradients go to who needs them (`exchange`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import screen
from .activation import Activation, TopK, through_relu
from .decoder_grads import Apply, DecoderGrads, Room
from .exchange import ALONE, Exchange, sum_in_order
from .losses import Extras, Penalties, auxk_width, dead_codes
from .micro_batch import MicroBatch
from .placement import ON_DEVICE, Placement
from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder

NOTHING = Extras()


class StepResult(NamedTuple):
    """Of this process's layers and tokens: summed over all processes it is that of the step."""

    fvu: Tensor
    """(layer,): loss by target"""
    l0: Tensor
    """(layer,): mean number of positive activations of a token"""
    fired: Tensor
    """(layer, latent) int64: tokens for which it was positive"""
    square_error: Tensor
    """(layer, token): squared error of each standardised target, over all micro-batches"""
    extra: dict[str, Tensor]
    """losses beside FVU, weight included: those of sparsity, auxk and dead_latents that are in use"""

    @property
    def loss(self) -> Tensor:
        return torch.stack([self.fvu.sum(), *self.extra.values()]).sum()


@torch.no_grad()
def train_step(
    model: CrossLayerTranscoder,
    batches: Sequence[Batch],
    apply: Apply,
    variance: str = "cache",
    extras: Extras = NOTHING,
    placement: Placement = ON_DEVICE,
    exchange: Exchange = ALONE,
) -> StepResult:
    """Gradients of sum_t FVU_t and `extras`, of all micro-batches together, handed to `apply` layer by layer.

    variance "cache": that of the standardiser; "batch": that of the step's own targets. placement: brings
    decoders where they are needed.
    """
    placement.start()
    step = _Step(model, batches, variance, exchange)
    penalties, auxk = Penalties(model, extras, step.n_tokens, exchange), _AuxK(model, extras)
    for source in model.own:
        _encode(step, source, extras, penalties)
    step.exchange_codes()
    penalties.exchange_norm_grads()
    room = Room(model)

    def final(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        sum_in_order(exchange, grads.values())
        apply(side, layer, grads)

    decoders = DecoderGrads(model, exchange, final, penalties, room, placement)
    errors = {target: _target(step, target, decoders, auxk) for target in model.own}
    decoders.finish_shared()
    step.exchange_code_grads()
    for source in model.own:
        _source(step, source, penalties, final, room)
    placement.settle()
    return step.result(errors, penalties.values | auxk.values)


class _Step:
    """The micro-batches of one step, and all that does not change in it."""

    def __init__(
        self, model: CrossLayerTranscoder, batches: Sequence[Batch], variance: str, exchange: Exchange
    ) -> None:
        self.model, self.variance, self.exchange = model, variance, exchange
        self.parts = [MicroBatch(model, batch) for batch in batches]
        self.n_tokens = sum(len(batch.all_tokens) for batch in batches)
        """Of all replicas"""

    def exchange_codes(self) -> None:
        """Each target's sources get there; for those of others gradients begin at zero."""
        tokens = [len(part.batch) for part in self.parts]
        for codes, grads in self._kinds():
            self.exchange.codes(codes, tokens)
            for part, theirs in zip(codes, grads, strict=True):
                for source in part.keys() - theirs.keys():
                    theirs[source] = torch.zeros_like(part[source].values)

    def exchange_code_grads(self) -> None:
        for codes, grads in self._kinds():
            self.exchange.code_grads(codes, grads)

    def _kinds(self) -> Iterator[tuple[list[dict[int, Codes]], list[dict[int, Tensor]]]]:
        """Codes and their gradients, by micro-batch and source; AuxK's after them."""
        yield [part.codes for part in self.parts], [part.code_grads for part in self.parts]
        if self.parts[0].dead_codes:
            yield [part.dead_codes for part in self.parts], [part.dead_code_grads for part in self.parts]

    def total_variance(self, target: int) -> Tensor:
        """What the summed squared error is divided by; holds one micro-batch's targets at a time."""
        if self.variance == "cache":
            return self.model.outputs.variance[target] * self.n_tokens
        total = torch.stack([part.targets(target).sum(dim=0) for part in self.parts]).sum(dim=0)
        mean = self.exchange.sum_replicas(total) / self.n_tokens
        centred = (part.targets(target).sub_(mean) for part in self.parts)
        squares: list[Tensor] = [torch.linalg.vector_norm(values).square() for values in centred]
        return self.exchange.sum_replicas(torch.stack(squares).sum())

    def result(self, errors: dict[int, tuple[Tensor, Tensor]], extra: dict[str, Tensor]) -> StepResult:
        """errors: FVU and each token's squared error, by target."""
        n_layers, some = self.model.shape.n_layers, next(iter(errors.values()))[1]
        fvu, square_error = some.new_zeros(n_layers), some.new_zeros(n_layers, len(some))
        fired = torch.zeros(n_layers, self.model.shape.n_latents, dtype=torch.int64, device=some.device)
        for layer, (share, per_token) in errors.items():
            fvu[layer], square_error[layer] = share, per_token
            fired[layer] = _fired(self.parts, layer)
        return StepResult(fvu, fired.sum(dim=1) / self.n_tokens, fired, square_error, extra)


def _target(step: _Step, target: int, decoders: DecoderGrads, auxk: "_AuxK") -> tuple[Tensor, Tensor]:
    """Decode one target, use up its gradients, and add what it wants of its sources' codes.

    Its FVU, and the squared error of each token.
    """
    model, scale = step.model, 1 / step.total_variance(target)
    decoders.begin(target)
    errors = []
    for part in step.parts:
        terms = model.terms(part.codes, target)
        error = model.decode_terms(terms, target).sub_(part.targets(target))
        if model.shape.skip:
            error.addmm_(part.inputs(target), model.W_skip[target].T)
        errors.append(torch.linalg.vector_norm(error, dim=1).square_())
        auxk.add(part, target, error, scale, decoders)
        grad = error.mul_(2 * scale)
        decoders.add(target, part, grad, terms)
    decoders.finish(target)
    per_token = torch.cat(errors)
    return per_token.sum() * scale, per_token


class _AuxK:
    """The loss of dead latents that rebuild what is left of each target."""

    def __init__(self, model: CrossLayerTranscoder, extras: Extras) -> None:
        self.model, self.dead = model, extras.dead
        self.weight = extras.auxk
        self.values = {"auxk": model.inputs.mean.new_zeros(())} if self.weight else {}

    def add(
        self, part: MicroBatch, target: int, error: Tensor, scale: Tensor, decoders: DecoderGrads
    ) -> None:
        """One micro-batch's. error (token, d_model): prediction minus truth, fixed; scale: 1 / variance."""
        if not part.dead_codes:
            return
        assert self.dead is not None
        sources = self.model.shape.sources(target)
        n_dead = int(self.dead[sources.start : sources.stop].sum())
        weight = self.weight * scale * min(n_dead / auxk_width(self.model.shape.d_model), 1)
        terms = self.model.terms(part.dead_codes, target)
        left = error.clone()
        for term in terms:
            left = term.merged.decode(self.model.term_weight(term), left)
        self.values["auxk"] += left.square().sum() * weight
        grad = left.mul_(2 * weight)
        decoders.add_terms(grad, terms, part.dead_codes, part.dead_code_grads)


def _encode(step: _Step, source: int, extras: Extras, penalties: Penalties) -> None:
    """Codes of one source for all micro-batches."""
    model, parts = step.model, step.parts

    def pres() -> Iterator[Tensor]:
        for part in parts:
            pre = model.pre_activations(part.inputs(source), source)
            penalties.of_dead(source, pre)
            if extras.auxk and extras.dead is not None:
                dead = dead_codes(pre, extras.dead[source], auxk_width(model.shape.d_model))
                part.dead_codes[source], part.dead_code_grads[source] = dead, torch.zeros_like(dead.values)
            yield pre

    activation = model.activation(source, extras.k[source] if extras.k else None)
    found = None if extras.reads_dead else _screened(step, source, activation)
    found = found or activation.train(pres(), step.n_tokens, step.exchange.pool)
    for part, codes in zip(parts, found, strict=True):
        part.codes[source] = codes
        part.code_grads[source] = penalties.of_codes(source, codes)


def _screened(step: _Step, source: int, activation: Activation) -> list[Codes] | None:
    """The same codes without all pre-activations, where that is faster; None where it is not."""
    weight = step.model.arithmetic(step.model.W_enc[source])
    if not isinstance(activation, TopK) or not screen.is_worth_it(weight):
        return None
    small, found = screen.rounded(weight), []
    for part in step.parts:
        codes = screen.top_k(part.inputs(source), weight, small, step.model.b_enc[source], activation.k)
        if codes is None:
            return None
        found.append(codes)
    return found


def _source(step: _Step, source: int, penalties: Penalties, apply: Apply, room: Room) -> None:
    """One backward pass of one encoder, from the summed gradient of its codes."""
    model, parts = step.model, step.parts
    grads = {name: torch.zeros_like(getattr(model, name)[source]) for name in model.names("encoder")[1:]}
    grads["W_enc"] = room.take(model.W_enc[source])
    activation = model.activation(source)
    for number, part in enumerate(parts):
        codes, inputs = part.codes[source], part.inputs(source)
        rows = inputs.to(model.rows(model.W_enc[source][:1]).dtype)
        pre_grad, own = activation.backward(codes, part.code_grads[source])
        passes = [(codes, pre_grad)]
        if source in part.dead_codes:
            dead = part.dead_codes[source]
            passes.append((dead, through_relu(dead, part.dead_code_grads[source])))
        for place, (each, grad) in enumerate(passes):
            _, bias = each.encoder_grad(grad, rows, grads["W_enc"], add=number + place > 0)
            grads["b_enc"] += bias
        for name, grad in own.items():
            grads[name] += grad
        penalties.add_encoder(source, inputs, grads)
    apply("encoder", source, grads)
    room.give_back(grads["W_enc"])


def _fired(parts: list[MicroBatch], source: int) -> Tensor:
    codes = [part.codes[source] for part in parts]
    positive = torch.cat([each.columns[each.values > 0] for each in codes])
    return torch.bincount(positive, minlength=codes[0].n_latents)
