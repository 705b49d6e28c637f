"""Losses beside FVU: sparsity of codes, and two that bring dead latents back.

Each is a mean over tokens of a sum over sources and their latents i. n_i is the norm of all that latent i
writes, the concatenation of its decoders over targets (Ameisen et al. 2025), a_i its activation, theta_i its
threshold (0 but for jumprelu).

    sparsity        jumprelu: tanh(4 a_i n_i);  relu: a_i n_i
    dead latents    relu(theta_i - pre_i) n_i, for dead latents
                    (both of Anthropic's update of January 2025; all gradients flow, decoders' too)
    AuxK            FVU of a target's residual, held fixed, rebuilt by the d_model / 2 largest of relu(pre)
                    among the dead latents of each of its sources, with the same decoders and no bias,
                    times min(1, dead latents of the sources / (d_model / 2)) (Gao et al. 2024,
                    arXiv 2406.04093; EleutherAI's sparsify). The variance is that of the target.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .exchange import ALONE, Exchange
from .sparse import Codes
from .transcoder import CrossLayerTranscoder

TANH_SCALE = 4.0
"""c of the January 2025 update."""


class Extras(NamedTuple):
    """What a step does beside FVU at the transcoder's own k."""

    sparsity: float = 0.0
    """Weight of the sparsity loss, warm-up included."""
    auxk: float = 0.0
    """Weight of AuxK."""
    dead_latents: float = 0.0
    """Weight of the dead latents' loss."""
    dead: Tensor | None = None
    """(layer, latent): which are dead; None: none is."""
    k: tuple[int, ...] | None = None
    """By layer, while k is annealed; None: the transcoder's."""

    @property
    def reads_dead(self) -> bool:
        """Whether the pre-activations of dead latents are wanted, beside the codes."""
        return self.dead is not None and bool(self.auxk or self.dead_latents)


class Penalties:
    """Sparsity and dead latents' loss of one step, with the decoder norms that it began with."""

    def __init__(
        self, model: CrossLayerTranscoder, extras: Extras, n_tokens: int, exchange: Exchange
    ) -> None:
        self.model, self._exchange = model, exchange
        self.weights = {
            name: weight / n_tokens
            for name, weight in (("sparsity", extras.sparsity), ("dead_latents", extras.dead_latents))
            if weight
        }
        self.values = {name: model.inputs.mean.new_zeros(()) for name in self.weights}
        """By name, weight included."""
        dead = extras.dead if extras.dead is not None else torch.zeros(model.shape.n_layers, 0)
        self._dead = [torch.nonzero(row).flatten() for row in dead]
        self._norms: list[Tensor] = list(decoder_norms(model, exchange)) if self.weights else []
        self._norm_grads = [torch.zeros_like(norms) for norms in self._norms]

    def exchange_norm_grads(self) -> None:
        """Once all sources are encoded: the gradients of their norms, for the targets of all shards."""
        if self.weights:
            self._norm_grads = list(self._exchange.sum_shards(torch.stack(self._norm_grads)))

    def of_codes(self, source: int, codes: Codes) -> Tensor:
        """Take the codes of one micro-batch into account; the gradient of its values (code,)."""
        if "sparsity" not in self.weights:
            return torch.zeros_like(codes.values)
        weight, norms = self.weights["sparsity"], self._norms[source][codes.columns]
        if self.model.shape.activation == "relu":
            self.values["sparsity"] += weight * (codes.values * norms).sum()
            slope = torch.full_like(norms, weight)
        else:
            bent = torch.tanh(TANH_SCALE * codes.values * norms)
            self.values["sparsity"] += weight * bent.sum()
            slope = weight * TANH_SCALE * (1 - bent.square())
        self._norm_grads[source] += codes.by_latent(slope * codes.values)
        return slope * norms

    def of_dead(self, source: int, pre: Tensor) -> None:
        """Take the dead latents' pre-activations of one micro-batch, pre (token, latent), into account."""
        if "dead_latents" not in self.weights:
            return
        dead = self._dead[source]
        short = self.model.theta(source)[dead].sub(pre[:, dead]).clamp_(min=0).sum(dim=0)
        short *= self.weights["dead_latents"]
        self.values["dead_latents"] += (short * self._norms[source][dead]).sum()
        self._norm_grads[source][dead] += short

    def add_encoder(self, source: int, inputs: Tensor, grads: dict[str, Tensor]) -> None:
        """Add what dead latents want of their encoder, from one micro-batch's inputs (token, d_model)."""
        if "dead_latents" not in self.weights:
            return
        dead = self._dead[source]
        theta = self.model.theta(source)[dead]
        pre = torch.addmm(
            self.model.b_enc[source][dead], inputs, self.model.arithmetic(self.model.W_enc[source][dead]).T
        )
        push = (pre < theta) * (-self.weights["dead_latents"] * self._norms[source][dead])
        grads["W_enc"].index_add_(0, dead, push.T @ inputs)
        grads["b_enc"].index_add_(0, dead, push.sum(dim=0))
        if "log_threshold" in grads:
            grads["log_threshold"].index_add_(0, dead, -push.sum(dim=0) * theta)

    def decoder_grad(self, source: int, weight: Tensor) -> Tensor | None:
        """Gradient of one of the source's decoders, weight (latent, d_model); None where there is none."""
        if not self.weights:
            return None
        norms = self._norms[source]
        share = torch.where(norms > 0, self._norm_grads[source] / norms, 0)
        return share[:, None] * weight


def decoder_norms(model: CrossLayerTranscoder, exchange: Exchange = ALONE) -> Tensor:
    """(layer, latent): norm of all that each latent of each source writes, over all its targets."""
    squares = model.inputs.mean.new_zeros(model.shape.n_layers, model.shape.n_latents)
    for source in range(model.shape.n_layers):
        for target in model.shape.targets(source):
            if target in model.own:
                squares[source] += model.decoder(source, target).square().sum(dim=1)
    return exchange.sum_shards(squares).sqrt()


def dead_codes(pre: Tensor, dead: Tensor, k: int) -> Codes:
    """The k largest of relu(pre) (token, latent), or all, among the latents that are dead (latent,)."""
    latents = torch.nonzero(dead).flatten()
    values, places = pre[:, latents].topk(min(k, len(latents)), dim=1)
    places, order = places.sort(dim=1)
    return Codes.rectangle(values.gather(1, order).clamp_(min=0), latents[places], pre.shape[1])


def auxk_width(d_model: int) -> int:
    """Dead latents of a source and token that AuxK uses: d_model / 2."""
    return d_model // 2
