"""Runs where SAELens is installed: a LLaVA with a picture, our latents attached to it.

python check_sae_lens.py EXPORT MODEL REFERENCE.safetensors
"""

import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from safetensors.torch import load_file


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{what}: {error:.1e} of the largest")
    assert error < 1e-3, what


@torch.no_grad()
def main(export: str, model_folder: str, reference: str) -> None:
    expected = load_file(reference)
    layers = expected["x"].shape[1]
    saes = [SAE.load_from_disk(Path(export) / f"layer_{layer}", device="cpu") for layer in range(layers)]
    for layer, sae in enumerate(saes):
        close(
            sae.encode(expected["x"][:, layer]),
            expected["activations"][:, layer],
            f"activations of layer {layer}",
        )
    model = SAETransformerBridge.boot_transformers(model_folder, device="cpu")
    inputs = {"pixel_values": expected["pixels"]}
    close(model(expected["tokens"], **inputs)[0], expected["logits"], "logits of the model")
    for sae in saes:
        model.add_sae(sae, use_error_term=True)
    logits, cache = model.run_with_cache(expected["tokens"], **inputs)
    close(logits[0], expected["logits"], "logits with our latents and error terms")
    for layer in range(layers):
        found = cache[f"blocks.{layer}.mlp.hook_out.hook_sae_acts_post"][0]
        close(found, expected["activations"][:, layer], f"latents in layer {layer} of the running model")
    model.reset_saes()
    for sae in saes:
        model.add_sae(sae, use_error_term=False)
    replaced = model(expected["tokens"], **inputs)[0]
    change = float((replaced - expected["logits"]).abs().max() / expected["logits"].abs().max())
    print(f"logits without the error terms: {change:.1e} of the largest away")
    assert change > 1e-2


if __name__ == "__main__":
    main(*sys.argv[1:])
