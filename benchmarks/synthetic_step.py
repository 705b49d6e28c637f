"""A transcoder and batches of random numbers, for benchmarks of one step."""

from functools import cache

import numpy as np
import torch

from clt.cache_format.layout import BLOCK, SITES
from clt.train.reader import Batch
from clt.train.shape import Shape
from clt.train.source import Rows
from clt.train.transcoder import CrossLayerTranscoder, Standardiser, Zeros, pageable_zeros


def make_model(shape: Shape, zeros: Zeros = pageable_zeros) -> CrossLayerTranscoder:
    """Random decoders too, or no gradient would reach the encoders."""
    torch.manual_seed(0)
    sites = [
        Standardiser(torch.zeros(shape.n_layers, shape.d_model), torch.ones(shape.n_layers)) for _ in SITES
    ]
    model = CrossLayerTranscoder(shape, *sites, zeros=zeros)
    with torch.no_grad():
        for weight in model.W_dec:
            weight.uniform_(-0.01, 0.01)
    return model


@cache
def make_batch(shape: Shape, n_tokens: int) -> Batch:
    """Random int8 codes as the default cache holds them; values of about standard deviation 1."""
    rng = np.random.default_rng(0)
    size = (shape.n_layers, n_tokens, shape.d_model)
    blocks = (*size[:2], -(-shape.d_model // BLOCK))
    codes = {site: rng.normal(0, 8, size).round().astype(np.int8) for site in SITES}
    return Batch(
        Rows(codes, {site: np.full(blocks, 1 / 8, np.float16) for site in SITES}), np.arange(n_tokens)
    )
