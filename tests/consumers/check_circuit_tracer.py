"""Runs where circuit-tracer is installed: its activations, errors, graph and scores from an export of ours.

python check_circuit_tracer.py EXPORT MODEL REFERENCE.safetensors
"""

import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"{what}: {error:.1e} of the largest")
    assert error < 1e-4, what


@torch.no_grad()
def load(export: str, expected: dict[str, torch.Tensor]) -> Any:
    """The transcoder, after it was loaded in all four ways."""
    for lazy_encoder in (False, True):
        for lazy_decoder in (False, True):
            transcoder, config = load_transcoder_from_hub(
                export,
                device=torch.device("cpu"),
                lazy_encoder=lazy_encoder,
                lazy_decoder=lazy_decoder,
            )
            activations = transcoder.encode(expected["x"].transpose(0, 1)).transpose(0, 1)
            close(activations, expected["activations"], f"activations, lazy {lazy_encoder}, {lazy_decoder}")
    assert config["feature_input_hook"] == "mlp.hook_in"
    return transcoder


def main(export: str, model_folder: str, reference: str) -> None:
    expected = load_file(reference)
    tokens = expected["tokens"]
    transcoder = load(export, expected)
    model = ReplacementModel.from_pretrained_and_transcoders(
        model_folder, transcoder, backend="nnsight", device=torch.device("cpu"), dtype=torch.float32
    )
    logits, activations = model.get_activations(tokens)
    close(logits.squeeze(0), expected["logits"], "logits of the model")
    # circuit-tracer leaves out the first position
    close(activations.transpose(0, 1)[1:], expected["activations"][1:], "activations in the model")
    context = model.setup_attribution(tokens)
    close(context.error_vectors.transpose(0, 1)[1:], expected["error"][1:], "error vectors")
    graph = attribute(tokens, model, batch_size=16, max_n_logits=3)
    replacement, completeness = compute_graph_scores(graph)
    print(json.dumps({"replacement": float(replacement), "completeness": float(completeness)}))
    assert 0 <= float(replacement) <= float(completeness) <= 1


if __name__ == "__main__":
    main(*sys.argv[1:])
