"""circuit-tracer (Safety Research, Decode): cross-layer transcoders and transcoder sets.

Its cross-layer decoders reach from each source to the last layer: [latent, layers - source, d_model]. Targets
beyond ours are zeros, which are holes in the file.
"""

from pathlib import Path

import torch

from ..train.origin import Origin
from .folding import FoldedTranscoder
from .tensor_file import TensorFile, write_tensors

ROWS = 256
"""Latents whose decoders are in memory at a time."""
HOOKS = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}


def write_circuit_tracer(run: FoldedTranscoder, origin: Origin, out: Path, dtype: torch.dtype) -> None:
    """config.yaml and a folder of safetensors, for `load_transcoder_from_hub(out)`."""
    kind = "transcoder_set" if run.shape.n_targets == 1 else "cross_layer_transcoder"
    for place in range(run.shape.n_layers):
        if kind == "transcoder_set":
            _write_layer(run, place, out, dtype)
        else:
            _write_encoder(run, place, out, dtype)
            _write_decoders(run, place, out, dtype)
    (out / "config.yaml").write_text(
        f"model_kind: {kind}\n"
        f"model_name: {origin.model}\n"
        f"feature_input_hook: {HOOKS[origin.input_site]}\n"
        "feature_output_hook: mlp.hook_out\n"
        f"scan: {origin.scan}\n"
    )


def _write_encoder(run: FoldedTranscoder, source: int, out: Path, dtype: torch.dtype) -> None:
    encoder = run.encoder(source)
    tensors = {
        f"W_enc_{source}": encoder.weight.to(dtype),
        f"b_enc_{source}": encoder.bias,
        f"b_dec_{source}": run.bias(source),
    }
    if encoder.threshold is not None:
        tensors[f"threshold_{source}"] = encoder.threshold
    write_tensors(out / f"W_enc_{source}.safetensors", tensors)


def _write_decoders(run: FoldedTranscoder, source: int, out: Path, dtype: torch.dtype) -> None:
    shape = run.shape
    targets, reach = shape.targets(source), shape.n_layers - source
    name, size = f"W_dec_{source}", (shape.n_latents, reach, shape.d_model)
    with TensorFile(out / f"{name}.safetensors", {name: (dtype, size)}) as file:
        for first in range(0, shape.n_latents, ROWS):
            latents = slice(first, min(first + ROWS, shape.n_latents))
            rows = torch.stack([run.decoder(source, target, latents) for target in targets], dim=1)
            if len(targets) == reach:
                file.write(name, rows, first * reach * shape.d_model)
                continue
            for latent, row in enumerate(rows.to(dtype), start=first):
                file.write(name, row, latent * reach * shape.d_model)


def _write_layer(run: FoldedTranscoder, place: int, out: Path, dtype: torch.dtype) -> None:
    encoder = run.encoder(place)
    tensors = {
        "W_enc": encoder.weight.to(dtype),
        "W_dec": run.decoder(place, place).to(dtype),
        "b_enc": encoder.bias,
        "b_dec": run.bias(place),
    }
    if encoder.threshold is not None:
        tensors["activation_function.threshold"] = encoder.threshold
    if run.shape.skip:
        tensors["W_skip"] = run.skip(place).to(dtype)
    write_tensors(out / f"layer_{place}.safetensors", tensors)
