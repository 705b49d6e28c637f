"""The cross-layer transcoder: source layers read MLP inputs, and write to their own and later MLP outputs.

    a_s = activation(W_enc[s] x_s + b_enc[s])       (see activation.py)
    y_t = sum over s with t - n_targets < s <= t of  a_s W_dec[s, t]  +  b_dec[t]  (+ W_skip[t] x_t)

With tie "source" W_dec[s, t] is the same for all t, with "target" for all s.
(Lindsey et al. 2025, "Circuit Tracing"; Ameisen et al. 2025.) Inside, x and y are standardised: minus the
cache's mean, over the root mean square deviation of a value. `forward` takes and gives model units.
"""

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..cache_format.layout import SITES
from ..cache_format.statistics import Statistics
from .activation import Activation, BatchTopK, GroupMax, JumpRelu, Relu, TopK
from .config import TranscoderConfig
from .source import Source
from .sparse import Codes, Merged, merge

FIRST_THRESHOLD = 0.1
"""Of jumprelu, as in Anthropic's update of January 2025."""


@dataclass(frozen=True)
class Shape:
    """All sizes of a transcoder."""

    layers: tuple[int, ...]
    """Of the model, ascending; sources and targets are counted by their place in this list."""
    d_model: int
    n_latents: int
    """Of each layer."""
    k: int | tuple[int, ...] | None
    """Active latents of a token in every layer, or by layer; None where the activation has no k."""
    n_targets: int
    tie: str = "none"
    """none, source or target: see `TranscoderConfig`"""
    skip: bool = False
    """Whether each target has a linear map of its own layer's input"""
    activation: str = "topk"
    bandwidth: float | None = None
    """Of jumprelu's straight-through gradient."""

    @classmethod
    def of(cls, config: TranscoderConfig, layers: tuple[int, ...], d_model: int) -> "Shape":
        latents = config.latents or config.expansion_factor * d_model
        c = config
        shape = cls(
            layers, d_model, latents, c.k, c.n_targets, c.tie, c.skip_connection, c.activation, c.bandwidth
        )
        if isinstance(c.k, tuple) and len(c.k) != len(layers):
            raise ValueError(
                f"--k: expected one number, or one for each of {len(layers)} layers, found {c.k}"
            )
        if max(shape.layer_k, default=0) > latents:
            raise ValueError(f"--k: expected at most the {latents} latents of a layer, found {c.k}")
        if c.activation == "groupmax" and any(latents % k for k in shape.layer_k):
            raise ValueError(f"--k: groupmax expects a divisor of the {latents} latents, found {c.k}")
        return shape

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_k(self) -> tuple[int, ...]:
        """By layer; empty where the activation has no k."""
        if self.k is None:
            return ()
        return (self.k,) * self.n_layers if isinstance(self.k, int) else self.k

    def targets(self, source: int) -> range:
        """Targets that the source writes to, its own layer first."""
        return range(source, min(source + self.n_targets, self.n_layers))

    def sources(self, target: int) -> range:
        """Sources that write to `target`, oldest first."""
        return range(max(0, target - self.n_targets + 1), target + 1)

    @property
    def n_pairs(self) -> int:
        """(source, target) pairs."""
        return sum(len(self.sources(t)) for t in range(self.n_layers))

    @property
    def n_decoders(self) -> int:
        return self.n_pairs if self.tie == "none" else self.n_layers

    @property
    def n_parameters(self) -> int:
        encoder = self.d_model + 1 + (self.activation == "jumprelu")
        per_latent = self.n_layers * encoder + self.n_decoders * self.d_model
        per_target = self.d_model + self.skip * self.d_model**2
        return self.n_latents * per_latent + self.n_layers * per_target

    def decoder_size(self, layer: int) -> tuple[int, ...]:
        """Of the layer's `W_dec`."""
        own = (self.n_latents, self.d_model)
        return (len(self.sources(layer)), *own) if self.tie == "none" else own

    def decoder_place(self, source: int, target: int) -> tuple[int, int | EllipsisType]:
        """(layer, slot): `W_dec[layer][slot]` carries the source to the target."""
        if self.tie == "none":
            return target, source - self.sources(target).start
        return (source if self.tie == "source" else target), ...

    def last_target(self, layer: int) -> int:
        """The last target that uses the layer's `W_dec`."""
        return min(layer + self.n_targets, self.n_layers) - 1 if self.tie == "source" else layer


class Standardiser(nn.Module):
    """Mean and scale of one site: (layer, d_model) and (layer,)."""

    mean: Tensor
    scale: Tensor
    variance: Tensor
    """(layer,): mean squared deviation of a standardised token in the cache trained on; d_model, unless
    mean and scale come from elsewhere. Not part of checkpoints."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("variance", torch.full_like(scale, mean.shape[1]), persistent=False)

    def measure(self, variance: npt.NDArray[np.float64]) -> None:
        """Set `variance` from a cache's own, (layer,) in squared model units."""
        square = self.scale.double().square()
        self.variance.copy_(torch.from_numpy(variance).to(square) / square)

    def apply_to(self, values: Tensor, layer: int) -> Tensor:
        """Model units to standard units, in place: (token, d_model)."""
        return values.sub_(self.mean[layer]).div_(self.scale[layer])

    def undo(self, values: Tensor, layer: int) -> Tensor:
        return values * self.scale[layer] + self.mean[layer]


class Term(NamedTuple):
    """One product of a target's sum: the codes of some sources times the decoder `W_dec[layer][slot]`."""

    sources: tuple[int, ...]
    merged: Merged
    layer: int
    slot: int | EllipsisType


class CrossLayerTranscoder(nn.Module):
    """Parameters by layer, so that a step can hold, update and save one layer at a time.

    W_enc[s] (latent, d_model), b_enc[s] and (jumprelu) log_threshold[s] (latent,), b_dec[t] (d_model,),
    W_skip[t] (d_model out, d_model in)
    where the shape has a skip. W_dec[t] (source, latent, d_model) with the sources of `shape.sources(t)`;
    tied, W_dec[layer] (latent, d_model): `decoder` finds the one of a pair. Decoders and skips start at zero,
    encoders uniform in +-1/sqrt(d_model), thresholds at 0.1. `threshold` (layer,) is batchtopk's running one.
    """

    threshold: Tensor

    def __init__(self, shape: Shape, inputs: Standardiser, outputs: Standardiser, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.inputs, self.outputs = shape, inputs, outputs
        random = torch.Generator().manual_seed(seed)
        bound = shape.d_model**-0.5

        def parameters(*sizes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=inputs.mean.dtype)) for s in sizes)

        layers, latents, width = range(shape.n_layers), shape.n_latents, shape.d_model
        self.W_enc = parameters(*[(latents, width) for _ in layers])
        self.b_enc = parameters(*[(latents,) for _ in layers])
        self.W_dec = parameters(*[shape.decoder_size(layer) for layer in layers])
        self.b_dec = parameters(*[(width,) for _ in layers])
        self.W_skip = parameters(*[(width, width) for _ in layers if shape.skip])
        jumps = shape.activation == "jumprelu"
        self.log_threshold = parameters(*[(latents,) for _ in layers if jumps])
        for log_threshold in self.log_threshold:
            nn.init.constant_(log_threshold, math.log(FIRST_THRESHOLD))
        if shape.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(shape.n_layers, dtype=inputs.mean.dtype))
        for weight in self.W_enc:
            nn.init.uniform_(weight, -bound, bound, generator=random)

    def encode_layer(self, standard: Tensor, source: int) -> Codes:
        """Codes of one source from its standardised inputs (token, d_model)."""
        return self.activation(source).infer(self.pre_activations(standard, source))

    def pre_activations(self, standard: Tensor, source: int) -> Tensor:
        """(token, latent) from standardised inputs (token, d_model)."""
        pre: Tensor = torch.addmm(self.b_enc[source], standard, self.W_enc[source].T)
        return pre

    def activation(self, source: int, k: int | None = None) -> Activation:
        """The source's, as its parameters are now; k: instead of the shape's."""
        name = self.shape.activation
        if name == "relu":
            return Relu()
        if name == "jumprelu":
            assert self.shape.bandwidth is not None
            return JumpRelu(self.log_threshold[source], self.shape.bandwidth)
        k = k or self.shape.layer_k[source]
        if name == "batchtopk":
            return BatchTopK(k, self.threshold[source])
        return GroupMax(k) if name == "groupmax" else TopK(k)

    def theta(self, source: int) -> Tensor:
        """(latent,): up to it a latent is never active."""
        if self.shape.activation == "jumprelu":
            theta: Tensor = self.log_threshold[source].exp()
            return theta
        return torch.zeros_like(self.b_enc[source])

    def names(self, side: str) -> tuple[str, ...]:
        """Parameters that belong to one layer's "encoder" or "decoder", and are updated together."""
        if side == "encoder":
            jumps = self.shape.activation == "jumprelu"
            return ("W_enc", "b_enc", "log_threshold") if jumps else ("W_enc", "b_enc")
        return ("W_dec", "b_dec", "W_skip") if self.shape.skip else ("W_dec", "b_dec")

    def decoder(self, source: int, target: int) -> Tensor:
        """(latent, d_model): what the source's latents write to the target; shares memory with `W_dec`."""
        layer, slot = self.shape.decoder_place(source, target)
        weight: Tensor = self.W_dec[layer][slot]
        return weight

    def terms(self, codes: dict[int, Codes], target: int) -> list[Term]:
        """What is summed for a target; sources that share its decoder are decoded as one."""
        sources = tuple(self.shape.sources(target))
        groups = [sources] if self.shape.tie == "target" else [(source,) for source in sources]
        return [
            Term(group, merge([codes[s] for s in group]), *self.shape.decoder_place(group[-1], target))
            for group in groups
        ]

    def decode_terms(self, terms: list[Term], target: int) -> Tensor:
        """Standardised output (token, d_model) of a target, without its skip."""
        out: Tensor = self.b_dec[target].repeat(terms[0].merged.codes.n_tokens, 1)
        for term in terms:
            term.merged.codes.decode(self.W_dec[term.layer][term.slot], out)
        return out

    def encode(self, x: Tensor) -> Tensor:
        """x: (token, layer, d_model) in model units -> activations (token, layer, latent), mostly zero."""
        out = x.new_zeros(len(x), self.shape.n_layers, self.shape.n_latents)
        for source in range(self.shape.n_layers):
            out[:, source] = self.encode_layer(self._standard(x, source), source).dense()
        return out

    def decode(self, activations: Tensor) -> Tensor:
        """Activations (token, layer, latent) -> what latents and biases write, in model units; dense.

        (token, layer, d_model). This is all of the output, unless the shape has a skip: then add `skip(x)`.
        """
        outputs = []
        for target in range(self.shape.n_layers):
            written = self.b_dec[target]
            for source in self.shape.sources(target):
                written = written + activations[:, source] @ self.decoder(source, target)
            outputs.append(self.outputs.undo(written, target))
        return torch.stack(outputs, dim=1)

    def skip(self, x: Tensor) -> Tensor:
        """What the skip connection adds to `decode`, in model units; (token, layer, d_model) as x."""
        out = torch.zeros_like(x)
        for layer, weight in enumerate(self.W_skip):
            out[:, layer] = self._standard(x, layer) @ weight.T * self.outputs.scale[layer]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x: (token, layer, d_model) -> the MLP outputs it predicts, same shape, in model units."""
        return self.decode(self.encode(x)) + self.skip(x)

    def _standard(self, x: Tensor, layer: int) -> Tensor:
        return self.inputs.apply_to(x[:, layer].clone(), layer)


def new_transcoder(
    config: TranscoderConfig, source: Source, dtype: torch.dtype, seed: int
) -> CrossLayerTranscoder:
    """A fresh transcoder for the source's layers, standardised by the source's statistics."""
    shape = Shape.of(config, source.layers, source.manifest.d_model)
    inputs, outputs = (_standardiser(source.statistics(site), dtype, site) for site in SITES)
    return CrossLayerTranscoder(shape, inputs, outputs, seed)


def empty_transcoder(shape: Shape, dtype: torch.dtype) -> CrossLayerTranscoder:
    """A transcoder whose numbers are still to be loaded."""
    inputs, outputs = (
        Standardiser(
            torch.zeros(shape.n_layers, shape.d_model, dtype=dtype), torch.ones(shape.n_layers, dtype=dtype)
        )
        for _ in SITES
    )
    return CrossLayerTranscoder(shape, inputs, outputs)


def _standardiser(statistics: Statistics, dtype: torch.dtype, site: str) -> Standardiser:
    scale = np.sqrt(statistics.variance / statistics.mean.shape[1])
    if not (scale > 0).all():
        dead = np.flatnonzero(scale <= 0).tolist()
        raise ValueError(f"{site} does not vary in layers {dead} (by place); leave them out with --layers")
    return Standardiser(torch.from_numpy(statistics.mean).to(dtype), torch.from_numpy(scale).to(dtype))
