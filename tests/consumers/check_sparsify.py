"""Runs where eai-sparsify is installed: its outputs from an export of ours.

python check_sparsify.py EXPORT REFERENCE.safetensors
"""

import sys

from safetensors.torch import load_file
from sparsify import SparseCoder


def main(export: str, reference: str) -> None:
    expected = load_file(reference)
    coders = SparseCoder.load_many(export, local=True, device="cpu")
    layers = expected["x"].shape[1]
    assert list(coders) == [f"layers.{layer}.mlp" for layer in range(layers)], list(coders)
    for layer, coder in enumerate(coders.values()):
        found = coder(expected["x"][:, layer], expected["y"][:, layer]).sae_out
        error = float((found - expected["outputs"][:, layer]).abs().max() / expected["outputs"].abs().max())
        print(f"layer {layer}: {error:.1e} of the largest")
        assert error < 1e-4, layer


if __name__ == "__main__":
    main(*sys.argv[1:])
