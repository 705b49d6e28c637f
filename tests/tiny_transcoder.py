"""A small transcoder and random batches for it."""

import numpy as np
import torch

from clt.cache_format.bf16 import to_bf16_bits
from clt.cache_format.layout import SITES
from clt.train.reader import Batch
from clt.train.shape import Shape
from clt.train.stored_rows import Rows
from clt.train.transcoder import CrossLayerTranscoder, Standardiser

SHAPE = Shape(layers=(0, 1, 2, 5), d_model=16, n_latents=40, k=4, n_targets=3)


def make_model(shape: Shape = SHAPE, seed: int = 0) -> CrossLayerTranscoder:
    """Random weights everywhere (decoders too, or no gradient would reach the encoders)."""
    torch.manual_seed(seed)
    sites = [
        Standardiser(
            torch.randn(shape.n_layers, shape.d_model, dtype=torch.float64),
            torch.rand(shape.n_layers, dtype=torch.float64) + 0.5,
        )
        for _ in SITES
    ]
    model = CrossLayerTranscoder(shape, sites[0], sites[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def make_batch(n_tokens: int, seed: int, shape: Shape = SHAPE) -> Batch:
    """Random activations in bf16, so that the batch's own numbers are exact."""
    rng = np.random.default_rng(seed)
    size = (shape.n_layers, n_tokens, shape.d_model)
    codes = {site: to_bf16_bits(rng.standard_normal(size, dtype=np.float32)) for site in SITES}
    scales = {site: np.zeros((*size[:2], 0), np.float16) for site in SITES}
    return Batch(Rows(codes, scales), np.arange(n_tokens))


def joined(parts: list[Batch]) -> Batch:
    """One batch that holds the parts' tokens, part after part."""
    rows = Rows(
        {site: np.concatenate([p.rows.codes[site] for p in parts], axis=1) for site in SITES},
        {site: np.concatenate([p.rows.scales[site] for p in parts], axis=1) for site in SITES},
    )
    return Batch(rows, np.arange(sum(map(len, parts))))
