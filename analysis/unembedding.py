"""A model's last two matrices, read from its files alone: the final norm's gain and the output embedding."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

HEADS = ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight")
"""Endings of the output embedding's name; the last two are the input's, which tied models share."""
NORMS = (".norm.weight", ".final_layernorm.weight", ".ln_f.weight", ".final_layer_norm.weight")
NOT_LANGUAGE = ("vision", "visual", "image", "audio", "layers.", "blocks.", "multi_modal", "connector")
ADDS_ONE = ("gemma",)
"""Model types whose norms multiply by 1 + weight."""


class Unembedding:
    """weight (vocabulary, d_model), the norm's gain folded in."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, written: Tensor) -> Tensor:
        """(row, vocabulary): change of logits by vectors (row, d_model) that are added to the last residual.

        To first order, where the final norm's own scale, which they would change too, is 1.
        """
        return written @ self.weight.T


def load_unembedding(model: str, d_model: int, device: torch.device) -> Unembedding:
    """model: a folder, or a hub id whose files lie in the hub's cache on this machine."""
    folder = _folder(model)
    where = _tensors(folder)
    head = _find(where, HEADS, folder)
    gain_name = _find(where, NORMS, folder)
    weight, gain = (_read(where[name], name) for name in (head, gain_name))
    if weight.shape[1] != d_model:
        raise ValueError(
            f"--model: {folder} has an output embedding of {weight.shape[1]} channels, the run {d_model}; "
            "give the model that the cache was harvested from"
        )
    config = json.loads((folder / "config.json").read_text())
    kind = str(config.get("text_config", config).get("model_type"))
    gain = gain.float() + 1 if kind.startswith(ADDS_ONE) else gain.float()
    return Unembedding((weight.float() * gain).to(device))


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    if not isinstance(found, str):
        raise ValueError(f"--model: expected a folder, or a hub id that is on this machine, found {model!r}")
    return Path(found).parent


def _tensors(folder: Path) -> dict[str, Path]:
    """Where each tensor lies."""
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    if not where:
        raise ValueError(f"--model: {folder} holds no .safetensors file, which the unembedding is read from")
    return where


def _find(where: dict[str, Path], endings: tuple[str, ...], folder: Path) -> str:
    for ending in endings:
        for name in where:
            if f".{name}".endswith(f".{ending.lstrip('.')}") and not any(p in name for p in NOT_LANGUAGE):
                return name
    raise ValueError(f"--model: {folder} has no tensor that ends in one of {', '.join(endings)}")


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
