"""Loading a model and its processor: once, in the numbers and on the devices that are asked for."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from ..devices import find_device
from .config import HarvestConfig
from .grids import LAYOUTS, knows
from .processors import open_processor


@dataclass(frozen=True)
class LoadedProcessor:
    """What turns samples into a model's input; no weights."""

    name: str
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    processor: Any = field(repr=False)
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
    body: nn.Module = field(repr=False)
    """The model without its LM head; called with the processor's output."""
    whole: Any = field(repr=False)
    """The same with it; a harvest does not run it."""
    device: torch.device
    weights_hash: str


def load_processor(config: HarvestConfig) -> LoadedProcessor:
    """Load config, tokenizer and processor; ValueError, on one line, where that does not work."""
    if config.model.startswith((".", "/", "~")) and not Path(config.model).is_dir():
        raise ValueError(f"model {config.model!r}: expected a folder or a hub id, found no such folder")
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _loading(config):
        model_config = AutoConfig.from_pretrained(config.model, **_origin(config))
        sees = model_config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        processor = (
            open_processor(config.model, model_config, **_origin(config))
            if sees
            else AutoTokenizer.from_pretrained(config.model, **_origin(config))
        )
    if sees and not knows(processor):
        print(
            f"harvest: {type(processor).__name__} is not one of {', '.join(LAYOUTS)}: image tokens are told "
            "from text, but where in the picture they look is not known (row and col -1)",
            file=sys.stderr,
            flush=True,
        )
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
    device = find_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and streams are the current device's
    loader = AutoModelForCausalLM if processor.image_token is None else AutoModelForImageTextToText
    placement = _placement(config, device)
    with _loading(config):
        model = loader.from_pretrained(config.model, **placement, **_origin(config))
    model.requires_grad_(False).eval()
    return LoadedModel(
        **vars(processor),
        body=model.base_model if model.base_model is not model else model.model,
        whole=model,
        device=next(model.get_input_embeddings().parameters()).device,
        weights_hash=hash_weights(model),
    )


def _placement(config: HarvestConfig, device: torch.device) -> dict[str, Any]:
    """How transformers is to hold the weights, which it reads straight to where they belong."""
    more: dict[str, Any] = {"dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype)}
    if config.attn:
        more["attn_implementation"] = config.attn
    if config.load_in:
        _want("bitsandbytes", f"--load-in {config.load_in}", "quantised")
        more["quantization_config"] = _quantised(config)
    if config.device_map or config.load_in or device.type != "cpu":
        _want("accelerate", f"--device-map {config.device_map or device}", "harvest")
        more["device_map"] = config.device_map or {"": device}
    return more


def _quantised(config: HarvestConfig) -> BitsAndBytesConfig:
    if config.load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _want(package: str, option: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{option}: expected {package}, found none; pip install 'clt-cache[{extra}]'")


def _origin(config: HarvestConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextmanager
def _loading(config: HarvestConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as fault:
        reason = " ".join(str(fault).split())
        if "trust_remote_code" in reason:
            raise ValueError(
                f"model {config.model!r} comes with code of its own; read it, and then allow it with "
                "--trust-remote-code"
            ) from fault
        raise ValueError(
            f"model {config.model!r}: expected a hub id or a folder for transformers: {reason[:300]}"
        ) from fault


def hash_weights(model: nn.Module) -> str:
    """Hash of every parameter's name, shape and 256 of its values, evenly spaced.

    Of what `device_map` left on disk or in host memory, name and shape alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // 256)
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if not parameter.is_meta:
            digest.update(flat[::step][:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"{config.model_type}: its config names no image token")
