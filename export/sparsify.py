"""EleutherAI's sparsify: per-layer transcoders with top-k or groupmax, or relu as a top-k of everything."""

import json
from pathlib import Path

import torch

from ..train.origin import Origin
from .folding import FoldedTranscoder
from .tensor_file import write_tensors


def write_sparsify(run: FoldedTranscoder, origin: Origin, out: Path, dtype: torch.dtype) -> None:
    """A folder for each layer, for `SparseCoder.load_many(out, local=True)`."""
    shape = run.shape
    for place, layer in enumerate(shape.layers):
        folder = out / f"layers.{layer}.mlp"
        folder.mkdir()
        encoder = run.encoder(place)
        tensors = {
            "encoder.weight": encoder.weight.to(dtype),
            "encoder.bias": encoder.bias.to(dtype),
            "W_dec": run.decoder(place, place).to(dtype),
            "b_dec": run.bias(place).to(dtype),
        }
        if shape.skip:
            tensors["W_skip"] = run.skip(place).to(dtype)
        write_tensors(folder / "sae.safetensors", tensors)
        config = {
            "activation": "groupmax" if shape.activation == "groupmax" else "topk",
            "expansion_factor": 32,  # not looked at where num_latents is given
            "normalize_decoder": False,
            "num_latents": shape.n_latents,
            "k": shape.layer_k[place] if shape.layer_k else shape.n_latents,
            "multi_topk": False,
            "skip_connection": shape.skip,
            "transcode": True,
            "d_in": shape.d_model,
        }
        (folder / "cfg.json").write_text(json.dumps(config, indent=1))
