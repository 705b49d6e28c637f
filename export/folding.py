"""A checkpoint in model units, read a matrix at a time: standardisation is folded into weights and biases.

With x = standard * s_in + m_in, and the same for y:

    W_enc' = W_enc / s_in             b_enc' = b_enc - W_enc' m_in         thresholds stay
    W_dec'[s, t] = s_out[t] W_dec     b_dec'[t] = s_out[t] b_dec + m_out
    W_skip'[t] = s_out[t] W_skip / s_in[t], and W_skip' m_in leaves b_dec'

Everything is given as float32; the sums inside are of float64.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..train.checkpoint import checkpoint_folder, load_shape


class Encoder(NamedTuple):
    """Of one layer, in model units."""

    weight: Tensor
    """(latent, d_model)"""
    bias: Tensor
    """(latent,)"""
    threshold: Tensor | None
    """(latent,): a latent is active where it is above this, strictly; None where 0 is the threshold."""


class FoldedTranscoder:
    """The checkpoint's tensors in model units; holds none of them."""

    def __init__(self, path: Path) -> None:
        self.folder = checkpoint_folder(path)
        self.shape = load_shape(self.folder)

    def encoder(self, source: int) -> Encoder:
        weight, bias = self._encoder(source)
        return Encoder(weight.float(), bias.float(), self._threshold(source))

    def bias_over_threshold(self, source: int) -> Tensor:
        """(latent,): bias minus threshold, rounded once."""
        bias, threshold = self._encoder(source)[1], self._threshold(source)
        return (bias if threshold is None else bias - threshold.double()).float()

    def _encoder(self, source: int) -> tuple[Tensor, Tensor]:
        stored = self._read(source, "W_enc", "b_enc", "in_mean", "in_scale")
        weight = stored["W_enc"].double() / stored["in_scale"].double()
        return weight, stored["b_enc"].double() - weight @ stored["in_mean"].double()

    def decoder(self, source: int, target: int, latents: slice = slice(None)) -> Tensor:
        """(latent, d_model) of some latents of one pair."""
        layer, slot = self.shape.decoder_place(source, target)
        index = (latents,) if slot is ... else (slot, latents)
        with safe_open(self._path(layer), "pt") as file:
            weight: Tensor = file.get_slice("W_dec")[index]
        return (weight.double() * self._read(target, "out_scale")["out_scale"].double()).float()

    def bias(self, target: int) -> Tensor:
        """(d_model,)"""
        stored = self._read(target, "b_dec", "out_mean", "out_scale")
        bias = stored["b_dec"].double() * stored["out_scale"].double() + stored["out_mean"].double()
        if self.shape.skip:
            bias -= self.skip(target).double() @ self._read(target, "in_mean")["in_mean"].double()
        return bias.float()

    def skip(self, target: int) -> Tensor:
        """(d_model out, d_model in)"""
        stored = self._read(target, "W_skip", "in_scale", "out_scale")
        scale = stored["out_scale"].double() / stored["in_scale"].double()
        return (stored["W_skip"].double() * scale).float()

    def _threshold(self, source: int) -> Tensor | None:
        if self.shape.activation == "jumprelu":
            return self._read(source, "log_threshold")["log_threshold"].double().exp().float()
        if self.shape.activation == "batchtopk":  # active from the threshold on, that is above its neighbour
            reached = self._read(source, "threshold")["threshold"].float()
            above = torch.nextafter(reached, torch.tensor(-torch.inf)).clamp(min=0)
            return above.expand(self.shape.n_latents).contiguous()
        return None

    def _read(self, place: int, *names: str) -> dict[str, Tensor]:
        with safe_open(self._path(place), "pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def _path(self, place: int) -> Any:
        return self.folder / f"layers.{self.shape.layers[place]}" / "transcoder.safetensors"
