"""What the weights of latents say: where they write, which others read alike, which tokens they promote."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize

from ..export.folding import FoldedTranscoder
from ..train.checkpoint import layer_tensors, load_shape
from ..train.shape import Shape
from ..train.transcoder import CrossLayerTranscoder, empty_transcoder
from .unembedding import Unembedding

ROWS = 512
"""Latents that are compared with all others, or with the vocabulary, at a time."""


class Tokens(NamedTuple):
    """Of each latent: token ids and the change of their logits at activation 1, both (latent, n)."""

    ids: npt.NDArray[np.int64]
    change: npt.NDArray[np.float32]


class Directions(NamedTuple):
    """Of one layer's latents."""

    target_norms: npt.NDArray[np.float32]
    """(latent, target): norm of what activation 1 writes to each target, over the target's own deviation"""
    similar: npt.NDArray[np.int64]
    """(latent, n): those of the same layer whose encoders are most alike, best first"""
    encoder_cosine: npt.NDArray[np.float32]
    decoder_cosine: npt.NDArray[np.float32]
    """(latent, n) both; decoders of all targets as one vector"""
    promoted: Tokens | None
    suppressed: Tokens | None


def load_encoder(folder: Path, place: int) -> CrossLayerTranscoder:
    """One layer of a checkpoint, which encodes as it does in the whole; its decoder is zero."""
    shape = load_shape(folder)
    layer = shape.layers[place]
    k = shape.layer_k[place] if shape.layer_k else None
    activation = {"activation": shape.activation, "bandwidth": shape.bandwidth}
    with safe_open(_path(folder, layer), "pt") as file:
        one = Shape((layer,), shape.d_model, shape.n_latents, k, n_targets=1, **activation)  # type: ignore[arg-type]
        model = empty_transcoder(one, file.get_tensor("W_enc").dtype)
        for name, tensor in layer_tensors(model, 0).items():
            if name not in ("W_dec", "b_dec"):
                tensor.copy_(file.get_tensor(name))
    return model


def directions(
    folder: Path, place: int, n_similar: int, unembedding: Unembedding | None, device: torch.device
) -> Directions:
    """Reads the layer's encoder once and each of its decoders once; holds two such matrices in float32."""
    folded = FoldedTranscoder(folder)
    shape = folded.shape
    with safe_open(_path(folder, shape.layers[place]), "pt") as file:
        encoder = file.get_tensor("W_enc").to(device).float()
    similar, cosine = _most_alike(encoder, min(n_similar, shape.n_latents - 1))
    norms, products, squares = [], torch.zeros_like(cosine), torch.zeros(shape.n_latents, device=device)
    decoder = encoder  # its room
    written = torch.zeros_like(encoder) if unembedding is not None else None
    for target in shape.targets(place):
        with safe_open(_path(folder, shape.layers[target]), "pt") as file:
            scale = float(file.get_tensor("out_scale"))
        for first in range(0, shape.n_latents, ROWS):
            rows = slice(first, first + ROWS)
            decoder[rows] = folded.decoder(place, target, rows).to(device)
        if written is not None:
            written += decoder
        decoder /= scale  # so that targets count alike, as they do in the loss
        norms.append(decoder.norm(dim=1) / shape.d_model**0.5)
        squares += torch.linalg.vector_norm(decoder, dim=1).square()
        for first in range(0, shape.n_latents, ROWS):
            rows = slice(first, first + ROWS)
            products[rows] += torch.einsum("ld,lnd->ln", decoder[rows], decoder[similar[rows]])
    size = squares.sqrt().clamp(min=1e-30)
    promoted, suppressed = (None, None)
    if written is not None and unembedding is not None:
        promoted, suppressed = _promoted(written, unembedding)
    return Directions(
        torch.stack(norms, dim=1).cpu().numpy(),
        similar.cpu().numpy(),
        cosine.cpu().numpy(),
        (products / size[:, None] / size[similar]).cpu().numpy(),
        promoted,
        suppressed,
    )


def _most_alike(encoder: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(latent, n): places and cosines of the most similar other rows. Makes the rows unit vectors."""
    unit = normalize(encoder, dim=1, out=encoder)
    places, cosines = [], []
    for first in range(0, len(unit), ROWS):
        some = unit[first : first + ROWS] @ unit.T
        some[torch.arange(len(some)), first + torch.arange(len(some))] = -2.0  # not itself
        best = some.topk(n, dim=1)
        places.append(best.indices)
        cosines.append(best.values)
    return torch.cat(places), torch.cat(cosines)


def _promoted(written: Tensor, unembedding: Unembedding) -> tuple[Tokens, Tokens]:
    """written (latent, d_model): what activation 1 adds to the residual stream, over all targets."""
    ends: list[list[Tokens]] = [[], []]
    for first in range(0, len(written), ROWS):
        change = unembedding.logits(written[first : first + ROWS])
        for found, sign in zip(ends, (1, -1), strict=True):
            best = (sign * change).topk(min(8, change.shape[1]), dim=1)
            found.append(Tokens(best.indices.cpu().numpy(), (sign * best.values).cpu().numpy()))
    promoted, suppressed = (Tokens(*map(np.concatenate, zip(*found, strict=True))) for found in ends)
    return promoted, suppressed


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layers.{layer}" / "transcoder.safetensors"
