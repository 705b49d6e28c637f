"""EleutherAI's clt-training, which their `attribute` reads: banded, one decoder for each (source, target).

The outputs of all sources are added up, biases too, so that only the own layer's decoder has one. A latent
with a threshold theta is written as relu(pre - theta) + theta where that is positive.
"""

import json
from pathlib import Path

import torch

from ..train.origin import Origin
from .folding import FoldedTranscoder
from .tensor_file import TensorFile


def write_clt_training(run: FoldedTranscoder, origin: Origin, out: Path, dtype: torch.dtype) -> None:
    """A folder for each source layer; one pair's decoder is in memory at a time."""
    for source, layer in enumerate(run.shape.layers):
        folder = out / f"layers.{layer}.mlp"
        folder.mkdir()
        _write_source(run, source, folder / "sae.safetensors", dtype)
        (folder / "cfg.json").write_text(json.dumps(_config(run, source), indent=1))


def _write_source(run: FoldedTranscoder, source: int, path: Path, dtype: torch.dtype) -> None:
    shape, targets = run.shape, run.shape.targets(source)
    latents, width = shape.n_latents, shape.d_model
    sizes: dict[str, tuple[int, ...]] = {"encoder.weight": (latents, width), "encoder.bias": (latents,)}
    for offset in range(len(targets)):
        sizes[f"W_decs.{offset}"] = (latents, width)
        sizes[f"b_decs.{offset}"] = (width,)
        sizes[f"post_encs.{offset}"] = (latents,)
    encoder = run.encoder(source)
    with TensorFile(path, {name: (dtype, size) for name, size in sizes.items()}) as file:
        file.write("encoder.weight", encoder.weight)
        threshold = torch.zeros(latents) if encoder.threshold is None else encoder.threshold
        file.write("encoder.bias", run.bias_over_threshold(source))
        file.write("b_decs.0", run.bias(source))
        for offset, target in enumerate(targets):
            file.write(f"W_decs.{offset}", run.decoder(source, target))
            file.write(f"post_encs.{offset}", threshold)


def _config(run: FoldedTranscoder, source: int) -> dict[str, object]:
    shape = run.shape
    return {
        "dtype": "none",
        "activation": "topk",
        "expansion_factor": 32,  # not looked at where num_latents is given
        "normalize_decoder": False,
        "num_latents": shape.n_latents,
        "k": shape.layer_k[source] if shape.activation == "topk" else shape.n_latents,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": True,
        "tp_output": False,
        "n_targets": len(shape.targets(source)),
        "n_sources": len(shape.sources(source)),
        "normalize_io": False,
        "divide_cross_layer": False,
        "train_post_encoder": True,
        "post_encoder_scale": False,
        "per_source_tied": False,
        "secondary_target_tied": False,
        "coalesce_topk": "none",
        "topk_coalesced": False,
        "use_fp8": False,
        "d_in": shape.d_model,
    }
