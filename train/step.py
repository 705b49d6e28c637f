"""One optimiser step, target-major: exact gradients of the joint loss, held for one layer at a time.

The loss is the sum over targets of FVU_t, the squared error over the variance. A decoder is used at its
own target only, and targets meet nowhere but in the codes; so codes are computed first, then each target
is decoded, its decoder's gradient is used up at once, and its gradient towards the codes is added; at last
each encoder gets one sparse backward pass. A decoder tied by source serves n_targets targets, and is updated
after the last of them; n_targets gradients are held then.

Where layers are spread over processes, each does this for its own, and between the three parts codes and
their gradients go to who needs them (`exchange`).
"""

from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import through_relu
from .exchange import ALONE, Exchange, sum_in_order
from .losses import Extras, Penalties, auxk_width, dead_codes
from .placement import ON_DEVICE, Placement
from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder, Term

Apply = Callable[[str, int, dict[str, Tensor]], None]
"""Told (kind of layer: "decoder" or "encoder", its place, gradients by parameter) once these are final."""


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


class _MicroBatch:
    """Values of one micro-batch, made from stored numbers when asked, and its codes by source."""

    def __init__(self, model: CrossLayerTranscoder, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.codes: dict[int, Codes] = {}
        self.code_grads: dict[int, Tensor] = {}
        self.dead_codes: dict[int, Codes] = {}
        """AuxK's"""
        self.dead_code_grads: dict[int, Tensor] = {}

    def inputs(self, layer: int) -> Tensor:
        mean = self.model.inputs.mean
        return self.model.inputs.apply_to(self.batch.values("mlp_in", layer, mean.device, mean.dtype), layer)

    def targets(self, layer: int) -> Tensor:
        mean = self.model.outputs.mean
        return self.model.outputs.apply_to(
            self.batch.values("mlp_out", layer, mean.device, mean.dtype), layer
        )


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
    room = _Room(model)

    def final(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        sum_in_order(exchange, grads.values())
        apply(side, layer, grads)

    decoders = _DecoderGrads(step, final, penalties, room, placement)
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
        self.parts = [_MicroBatch(model, batch) for batch in batches]
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


class _Room:
    """Memory for gradients, used again and again: on a CPU new pages cost more than the products."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self.largest = max(weight.numel() for weight in (*model.W_dec, *model.W_enc))
        self.free: list[Tensor] = []
        self.dtype = model.inputs.mean.dtype

    def take(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a weight; what is in it has no meaning."""
        flat = self.free.pop() if self.free else weight.new_empty(self.largest, dtype=self.dtype)
        return flat[: weight.numel()].view_as(weight)

    def give_back(self, grad: Tensor) -> None:
        self.free.append(grad.new_empty(0).set_(grad.untyped_storage()))


class _DecoderGrads:
    """Gradients of the decoders that later targets still add to."""

    def __init__(
        self, step: _Step, apply: Apply, penalties: Penalties, room: _Room, placement: Placement
    ) -> None:
        self.model, self.exchange, self.placement = step.model, step.exchange, placement
        self.apply, self.penalties, self.room = apply, penalties, room
        self.held: dict[int, dict[str, Tensor]] = {}
        self.written: set[tuple[int, int | EllipsisType]] = set()

    def begin(self, target: int) -> None:
        self.placement.begin(target)
        names = self.model.names("decoder")
        own = {name: torch.zeros_like(getattr(self.model, name)[target]) for name in names[1:]}
        self.held[target] = own | self.held.get(target, {})
        for source in self.model.shape.sources(target):
            layer, _ = self.model.shape.decoder_place(source, target)
            if "W_dec" not in self.held.setdefault(layer, {}):
                self.held[layer]["W_dec"] = self.room.take(self.model.W_dec[layer])

    def add(self, target: int, part: _MicroBatch, grad: Tensor, terms: list[Term]) -> None:
        """One micro-batch's, and its codes', from `grad` (token, d_model) of the standardised output."""
        mine = self.held[target]
        mine["b_dec"] += grad.sum(dim=0)
        if self.model.shape.skip:
            mine["W_skip"].addmm_(grad.T, part.inputs(target))
        self.add_terms(grad, terms, part.codes, part.code_grads)

    def add_terms(
        self, grad: Tensor, terms: list[Term], codes: dict[int, Codes], code_grads: dict[int, Tensor]
    ) -> None:
        """Those of W_dec, and of each source's codes."""
        for term in terms:
            place, weight = (term.layer, term.slot), self.model.term_weight(term)
            whole, add = self.held[term.layer]["W_dec"][term.slot], place in self.written
            grad = grad.to(weight.dtype)  # bfloat16 rows, where kernels read them
            if len(term.sources) == 1:
                source = term.sources[0]
                codes[source].gradients(grad, weight, whole, code_grads[source], add=add)
            else:
                for source, part in zip(
                    term.sources, term.merged.gradients(grad, weight, whole, add=add), strict=True
                ):
                    code_grads[source] += part
            self.written.add(place)

    def finish(self, target: int) -> None:
        """Hand over those that no target after this one adds to."""
        for source in self.model.shape.sources(target):
            penalty = self.penalties.decoder_grad(source, self.model.decoder(source, target))
            if penalty is not None:
                layer, slot = self.model.shape.decoder_place(source, target)
                self.held[layer]["W_dec"][slot] += penalty
        for layer in [held for held in self.held if self.model.shape.last_target(held) == target]:
            if layer not in self.exchange.shared:
                self._hand_over(layer)

    def finish_shared(self) -> None:
        """Decoders that several ranks use: gradients go to the owner, and its new weights to the others."""
        for layer, users in self.exchange.shared.items():
            weight = self.model.W_dec[layer].data
            if layer in self.model.own:
                total = self.held[layer]["W_dec"]
                for shard in users:
                    total += self.exchange.received(total, shard)
                self._hand_over(layer)
                for shard in users:
                    self.exchange.send(weight, shard)
            elif layer in self.held:
                grad = self.held.pop(layer)["W_dec"]
                self.exchange.send(grad, self.exchange.owner(layer))
                self.room.give_back(grad)
                weight.copy_(self.exchange.received(weight, self.exchange.owner(layer)))

    def _hand_over(self, layer: int) -> None:
        grads = self.held.pop(layer)
        self.apply("decoder", layer, grads)
        self.placement.end(layer)
        self.room.give_back(grads["W_dec"])


def _target(step: _Step, target: int, decoders: _DecoderGrads, auxk: "_AuxK") -> tuple[Tensor, Tensor]:
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
        self, part: _MicroBatch, target: int, error: Tensor, scale: Tensor, decoders: _DecoderGrads
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
            left = term.merged.codes.decode(self.model.term_weight(term), left)
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
    found = activation.train(pres(), step.n_tokens, step.exchange.pool)
    for part, codes in zip(parts, found, strict=True):
        part.codes[source] = codes
        part.code_grads[source] = penalties.of_codes(source, codes)


def _source(step: _Step, source: int, penalties: Penalties, apply: Apply, room: _Room) -> None:
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


def _fired(parts: list[_MicroBatch], source: int) -> Tensor:
    codes = [part.codes[source] for part in parts]
    positive = torch.cat([each.columns[each.values > 0] for each in codes])
    return torch.bincount(positive, minlength=codes[0].n_latents)
