"""Loading a model, and finding the MLPs of its language model."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from .config import HarvestConfig

MLP_NAMES = ("mlp", "feed_forward", "ffn")
NORM_NAMES = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm_2", "ffn_norm")
"""Norms whose output the MLP reads, most specific first; which one it is gets checked on the first batch."""


@dataclass(frozen=True)
class LoadedProcessor:
    """What turns samples into a model's input; no weights."""

    name: str
    config: Any
    tokenizer: Any
    processor: Any
    """Same as the tokenizer for a language model."""
    image_token: int | None
    """Token id that stands for a picture; None for a language model."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def d_model(self) -> int:
        return int(self.text_config.hidden_size)

    @property
    def n_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)


@dataclass(frozen=True)
class LoadedModel(LoadedProcessor):
    body: nn.Module
    """The model without its LM head; called with the processor's output."""
    whole: Any
    """The same with it; a harvest does not run it."""
    device: torch.device
    weights_hash: str


class Hookpoints:
    """Paths, inside the body, of the modules to listen to; index = layer."""

    def __init__(self, mlps: list[str], norms: list[str] | None) -> None:
        self.mlps = mlps
        self.norms = norms
        """Set for input site resid_mid."""


def load_processor(config: HarvestConfig) -> LoadedProcessor:
    """Load config, tokenizer and processor; ValueError, on one line, where that does not work."""
    if config.model.startswith((".", "/", "~")) and not Path(config.model).is_dir():
        raise ValueError(f"model {config.model!r}: expected a folder or a hub id, found no such folder")
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _loading(config):
        model_config = AutoConfig.from_pretrained(config.model, **_origin(config))
        sees = model_config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        loader = AutoProcessor if sees else AutoTokenizer
        processor = loader.from_pretrained(config.model, **_origin(config))
    return LoadedProcessor(
        name=config.model,
        config=model_config,
        tokenizer=getattr(processor, "tokenizer", processor),
        processor=processor,
        image_token=_image_token(model_config) if sees else None,
    )


def load_model(config: HarvestConfig) -> LoadedModel:
    """Load model and processor; ValueError, on one line, where that does not work."""
    processor = load_processor(config)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    attention = {"attn_implementation": config.attn} if config.attn else {}
    loader = AutoModelForCausalLM if processor.image_token is None else AutoModelForImageTextToText
    with _loading(config):
        model = loader.from_pretrained(config.model, dtype=dtype, **attention, **_origin(config))
    model.requires_grad_(False).eval().to(device)
    return LoadedModel(
        **vars(processor),
        body=model.base_model if model.base_model is not model else model.model,
        whole=model,
        device=device,
        weights_hash=hash_weights(model),
    )


def _origin(config: HarvestConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextmanager
def _loading(config: HarvestConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as fault:
        reason = " ".join(str(fault).split())
        raise ValueError(
            f"model {config.model!r}: expected a hub id or a folder for transformers: {reason[:300]}"
        ) from fault


def find_hookpoints(model: LoadedModel, pattern: str | None, input_site: str) -> Hookpoints:
    """The MLPs of the language model in layer order; ValueError lists candidates where none fit."""
    modules = dict(model.body.named_modules())
    if pattern is not None:
        inner = pattern.removeprefix("model.") if pattern.format(0) not in modules else pattern
        mlps = [inner.format(layer) for layer in range(model.n_layers)]
        if not all(path in modules for path in mlps):
            raise ValueError(f"--mlp {pattern!r} matches no module; candidates: {_candidates(modules)}")
    else:
        mlps = _find_mlps(model, modules)
    norms = None
    if input_site == "resid_mid":
        parents = [path.rpartition(".")[0] for path in mlps]
        name = next((n for n in NORM_NAMES if all(f"{parent}.{n}" in modules for parent in parents)), None)
        if name is None:
            raise ValueError(
                f"resid_mid: expected a norm named one of {NORM_NAMES} in {parents[0]}, found none"
            )
        norms = [f"{parent}.{name}" for parent in parents]
    return Hookpoints(mlps, norms)


def hash_weights(model: nn.Module) -> str:
    """Hash of every parameter's name, shape and 256 of its values, evenly spaced."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 256)
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(flat[::step][:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _find_mlps(model: LoadedModel, modules: dict[str, nn.Module]) -> list[str]:
    """Look for a list of n_layers blocks with an MLP each, outside the vision tower."""
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or len(module) != model.n_layers or _sees(path):
            continue
        for name in MLP_NAMES:
            if all(isinstance(getattr(block, name, None), nn.Module) for block in module):
                return [f"{path}.{layer}.{name}" for layer in range(len(module))]
    raise ValueError(
        f"{model.name}: found no {model.n_layers} MLPs; name them with --mlp, "
        f"candidates: {_candidates(modules)}"
    )


def _candidates(modules: dict[str, nn.Module]) -> str:
    """Paths of layer 0 that hold linear maps, with the layer's number left open."""
    found = [
        path.replace(".0.", ".{}.", 1)
        for path, module in modules.items()
        if ".0." in path and list(module.children())
    ]
    return ", ".join(found[:20]) or "none"


def _sees(path: str) -> bool:
    return any(word in path for word in ("vision", "visual", "image"))


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"{config.model_type}: its config names no image token")
