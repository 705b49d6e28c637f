"""SAELens: one transcoder a layer. Of a cross-layer one it holds the encoders and the own layer's decoders.

Its activations are then exact and its outputs are not: use it with the error term.
"""

import json
from pathlib import Path

import torch

from ..train.origin import Origin
from .circuit_tracer import HOOKS
from .folding import FoldedTranscoder
from .tensor_file import write_tensors

VERSION = "6.54.12"
"""Of the format; SAELens rewrites what says less than 6."""


def write_sae_lens(run: FoldedTranscoder, origin: Origin, out: Path, dtype: torch.dtype) -> None:
    """A folder for each layer, for `SAE.load_from_disk`."""
    for place, layer in enumerate(run.shape.layers):
        folder = out / f"layer_{layer}"
        folder.mkdir()
        encoder = run.encoder(place)
        tensors = {
            "W_enc": encoder.weight.T.to(dtype).contiguous(),
            "b_enc": encoder.bias.to(dtype),
            "W_dec": run.decoder(place, place).to(dtype),
            "b_dec": run.bias(place).to(dtype),
        }
        if encoder.threshold is not None:
            tensors["threshold"] = encoder.threshold.to(dtype)
        if run.shape.skip:
            tensors["W_skip"] = run.skip(place).to(dtype)
        write_tensors(folder / "sae_weights.safetensors", tensors)
        (folder / "cfg.json").write_text(json.dumps(_config(run, origin, place, dtype), indent=1))


def _config(run: FoldedTranscoder, origin: Origin, place: int, dtype: torch.dtype) -> dict[str, object]:
    shape, layer = run.shape, run.shape.layers[place]
    jumps = "jumprelu_" if shape.activation in ("jumprelu", "batchtopk") else ""
    note = "encoder view; W_dec is the same-layer decoder only" if shape.n_targets > 1 else "whole"
    hf_names = {"hf_hook_name_out": f"{origin.mlp(layer)}.output"}
    if origin.input_site == "mlp_in":  # what is before the norm is no module's input of one name
        hf_names["hf_hook_name"] = f"{origin.mlp(layer)}.input"
    return {
        "architecture": f"{jumps}{'skip_' if shape.skip else ''}transcoder",
        "d_in": shape.d_model,
        "d_sae": shape.n_latents,
        "d_out": shape.d_model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": origin.model,
            "hook_name": f"blocks.{layer}.{HOOKS[origin.input_site]}",
            "hook_name_out": f"blocks.{layer}.mlp.hook_out",
            **hf_names,
            "clt_note": note,
        },
    }
