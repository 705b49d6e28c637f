"""A transcoder and batches of random numbers, for benchmarks of one step."""

from functools import cache

import numpy as np
import torch

from clt.cache_format.layout import BLOCK, SITES
from clt.train.reader import Batch
from clt.train.shape import Shape
from clt.train.stored_rows import Rows
from clt.train.transcoder import CrossLayerTranscoder, Standardiser, Zeros, pageable_zeros


def make_model(
    shape: Shape, zeros: Zeros = pageable_zeros, dtype: torch.dtype | None = None
) -> CrossLayerTranscoder:
    """Random decoders too, or no gradient would reach the encoders."""
    torch.manual_seed(0)
    sites = [
        Standardiser(torch.zeros(shape.n_layers, shape.d_model), torch.ones(shape.n_layers)) for _ in SITES
    ]
    model = CrossLayerTranscoder(shape, *sites, dtype=dtype, zeros=zeros)
    with torch.no_grad():
        for weight in model.W_dec:
            weight.uniform_(-0.01, 0.01)
    return model


SHAPES = {
    576: Shape(tuple(range(8)), d_model=576, n_latents=1152, k=32, n_targets=8),  # SmolLM2's width
    4096: Shape(tuple(range(5)), d_model=4096, n_latents=8192, k=32, n_targets=5),  # LLaVA-1.5's
}
"""With L layers that all write to all later ones, dense autograd needs 2 L matrix products for encoders and 3
for each of L (L + 1) / 2 decoders, where codes need L: 3 layers, with 8 times as many, say little of 32. Five
take 11 times as many, and fit 20 GB with all that autograd holds."""


@cache
def make_batch(shape: Shape, n_tokens: int) -> Batch:
    """Random int8 codes as the default cache holds them; values of about standard deviation 1."""
    rng = np.random.default_rng(0)
    size = (shape.n_layers, n_tokens, shape.d_model)
    blocks = (*size[:2], -(-shape.d_model // BLOCK))
    codes = {site: np.empty(size, np.int8) for site in SITES}
    for layer in (layer for values in codes.values() for layer in values):  # small temporaries
        layer[:] = rng.normal(0, 8, layer.shape).round()
    return Batch(
        Rows(codes, {site: np.full(blocks, 1 / 8, np.float16) for site in SITES}), np.arange(n_tokens)
    )
