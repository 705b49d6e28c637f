"""The cross-layer transcoder: source layers read MLP inputs, and write to their own and later MLP outputs.

    a_s = activation(W_enc[s] x_s + b_enc[s])       (see activation.py)
    y_t = sum over s with t - n_targets < s <= t of  a_s W_dec[s, t]  +  b_dec[t]  (+ W_skip[t] x_t)

With tie "source" W_dec[s, t] is the same for all t, with "target" for all s.
(Lindsey et al. 2025, "Circuit Tracing"; Ameisen et al. 2025.) Inside, x and y are standardised: minus the
cache's mean, over the root mean square deviation of a value. `forward` takes and gives model units.
"""

import math
from collections.abc import Callable, Sequence
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
from .shape import Shape
from .source import Source
from .sparse import Codes, Merged, merge, on_triton

FIRST_THRESHOLD = 0.1
"""Of jumprelu, as in Anthropic's update of January 2025."""


Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor of zeros somewhere."""


def pageable_zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In ordinary memory."""
    return torch.zeros(size, dtype=dtype)


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

    W_enc[s] (latent, d_model), b_enc[s] and (jumprelu) log_threshold[s] (latent,), b_dec[t] (d_model,) and
    with a skip W_skip[t] (d_model out, d_model in). W_dec[t] (source, latent, d_model) with the sources of
    `shape.sources(t)`; tied, W_dec[layer] (latent, d_model): `decoder` finds the one of a pair. Decoders and
    skips start at zero, encoders uniform in +-1/sqrt(d_model), thresholds at 0.1.
    `threshold` (layer,) is batchtopk's running one.

    W_enc and W_dec are of `dtype`, by default that of the standardisers, in which all arithmetic is done: in
    bfloat16 they halve in size, and each is made float32 for as long as it is used.

    Of the layers that are not its `own`, because another process has them, parameters are empty; but decoders
    tied by source are there where a target of its own uses them.
    """

    threshold: Tensor
    own: tuple[int, ...]
    """Places of the layers whose parameters are here; all, unless other processes have the rest"""

    def __init__(
        self,
        shape: Shape,
        inputs: Standardiser,
        outputs: Standardiser,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        zeros: Zeros = pageable_zeros,
        own: Sequence[int] | None = None,
    ) -> None:
        """zeros: makes the matrices of decoders and skips."""
        super().__init__()
        self.shape, self.inputs, self.outputs = shape, inputs, outputs
        self.own = tuple(range(shape.n_layers)) if own is None else tuple(own)
        random = torch.Generator().manual_seed(seed)
        bound = shape.d_model**-0.5

        def parameters(
            *sizes: tuple[int, ...],
            dtype: torch.dtype | None = None,
            make: Zeros = pageable_zeros,
            here: Sequence[int] = self.own,
        ) -> nn.ParameterList:
            dtype = dtype or inputs.mean.dtype
            return nn.ParameterList(
                nn.Parameter(make(size, dtype) if layer in here else pageable_zeros((0,), dtype))
                for layer, size in enumerate(sizes)
            )

        layers, latents, width = range(shape.n_layers), shape.n_latents, shape.d_model
        self.W_enc = parameters(*[(latents, width) for _ in layers], dtype=dtype)
        self.b_enc = parameters(*[(latents,) for _ in layers])
        decoders = [shape.decoder_size(layer) for layer in layers]
        self.W_dec = parameters(*decoders, dtype=dtype, make=zeros, here=self.decoder_layers)
        self.b_dec = parameters(*[(width,) for _ in layers])
        self.W_skip = parameters(*[(width, width) for _ in layers if shape.skip], make=zeros)
        jumps = shape.activation == "jumprelu"
        self.log_threshold = parameters(*[(latents,) for _ in layers if jumps])
        for log_threshold in self.log_threshold:
            nn.init.constant_(log_threshold, math.log(FIRST_THRESHOLD))
        if shape.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(shape.n_layers, dtype=inputs.mean.dtype))
        for layer, weight in enumerate(self.W_enc):
            start = torch.empty(latents, width, dtype=inputs.mean.dtype)
            start.uniform_(-bound, bound, generator=random)  # drawn for all, so that each gets the same
            if layer in self.own:
                weight.data.copy_(start)

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """Places of the layers whose `W_dec` is here."""
        if self.shape.tie != "source":
            return self.own
        return tuple(sorted({source for target in self.own for source in self.shape.sources(target)}))

    def arithmetic(self, weight: Tensor) -> Tensor:
        """The weight as products take it: itself, or a copy where it is kept in bfloat16, or elsewhere."""
        return weight.to(self.inputs.mean)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as sparse products take it: Triton's kernels read bfloat16 rows as they are."""
        return weight if on_triton(weight) else self.arithmetic(weight)

    def encode_layer(self, standard: Tensor, source: int) -> Codes:
        """Codes of one source from its standardised inputs (token, d_model)."""
        return self.activation(source).infer(self.pre_activations(standard, source))

    def pre_activations(self, standard: Tensor, source: int) -> Tensor:
        """(token, latent) from standardised inputs (token, d_model)."""
        pre: Tensor = torch.addmm(self.b_enc[source], standard, self.arithmetic(self.W_enc[source]).T)
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
        """(latent, d_model): what the source's latents write to the target, as arithmetic takes it."""
        layer, slot = self.shape.decoder_place(source, target)
        return self.arithmetic(self.W_dec[layer][slot])

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
            term.merged.decode(self.term_weight(term), out)
        return out

    def term_weight(self, term: Term) -> Tensor:
        """(latent, d_model): the decoder of a term, as sparse products take it."""
        return self.rows(self.W_dec[term.layer][term.slot])

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
            out[:, layer] = self._standard(x, layer) @ self.arithmetic(weight).T * self.outputs.scale[layer]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x: (token, layer, d_model) -> the MLP outputs it predicts, same shape, in model units."""
        return self.decode(self.encode(x)) + self.skip(x)

    def _standard(self, x: Tensor, layer: int) -> Tensor:
        return self.inputs.apply_to(x[:, layer].clone(), layer)


def new_transcoder(
    config: TranscoderConfig, source: Source, dtype: torch.dtype, seed: int, zeros: Zeros = pageable_zeros
) -> CrossLayerTranscoder:
    """A fresh transcoder for the source's layers, standardised by the source's statistics."""
    shape = Shape.of(config, source.layers, source.manifest.d_model)
    work = torch.promote_types(dtype, torch.float32)
    inputs, outputs = (_standardiser(source.statistics(site), work, site) for site in SITES)
    return CrossLayerTranscoder(shape, inputs, outputs, seed, dtype, zeros, source.own)


def empty_transcoder(
    shape: Shape, dtype: torch.dtype, own: Sequence[int] | None = None
) -> CrossLayerTranscoder:
    """A transcoder whose numbers are still to be loaded."""
    work = torch.promote_types(dtype, torch.float32)
    inputs, outputs = (
        Standardiser(
            torch.zeros(shape.n_layers, shape.d_model, dtype=work), torch.ones(shape.n_layers, dtype=work)
        )
        for _ in SITES
    )
    return CrossLayerTranscoder(shape, inputs, outputs, dtype=dtype, own=own)


def _standardiser(statistics: Statistics, dtype: torch.dtype, site: str) -> Standardiser:
    scale = np.sqrt(statistics.variance / statistics.mean.shape[1])
    if not (scale > 0).all():
        dead = np.flatnonzero(scale <= 0).tolist()
        raise ValueError(f"{site} does not vary in layers {dead} (by place); leave them out with --layers")
    return Standardiser(torch.from_numpy(statistics.mean).to(dtype), torch.from_numpy(scale).to(dtype))
