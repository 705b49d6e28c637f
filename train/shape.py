"""Sizes and structure of a transcoder, and which of its decoders carries which source to which target."""

from dataclasses import dataclass
from types import EllipsisType

from .config import TranscoderConfig


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
