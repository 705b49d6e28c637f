"""The manifest of a harvest: everything that decides what the cache holds, compared on resume."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from ..cache_format import Manifest
from ..cache_format.manifest import Scalar
from .config import HarvestConfig
from .mlps import Hookpoints, path_pattern
from .model import LoadedModel
from .rows import Rows

AS_GIVEN = (
    *("input_site", "tokens", "max_samples", "val_fraction", "ctx_len", "keep_image_tokens", "text_column"),
    *("batch_tokens", "allow_outside", "fetch_urls"),
)


def describe(
    config: HarvestConfig, model: LoadedModel, rows: Rows, hookpoints: Hookpoints, layers: tuple[int, ...]
) -> Manifest:
    """Model, dataset, selection and versions by name and hash."""
    template = getattr(model.processor, "chat_template", None) or model.tokenizer.chat_template
    image_processor = str(getattr(model.processor, "image_processor", ""))
    source: dict[str, Scalar] = {
        "model": config.model,
        "model_type": model.config.model_type,
        "revision": config.revision or getattr(model.config, "_commit_hash", None),
        "weights_hash": model.weights_hash,
        "mlps": path_pattern(hookpoints.mlps),
        "norms": path_pattern(hookpoints.norms) if hookpoints.norms else None,
        "dtype": str(model.whole.dtype).removeprefix("torch."),
        "load_in": config.load_in,
        "attn": model.whole.config._attn_implementation,
        "chat_template_hash": _hash(template or ""),
        "processor_hash": _hash(image_processor + str(len(model.tokenizer))),
        "dataset": whereabouts(config.dataset),
        "dataset_split": config.split,
        "dataset_fingerprint": rows.fingerprint,
        "image_root": whereabouts(config.image_root) if config.image_root else None,
        "exclude": ",".join(sorted(config.exclude)),
        **{name: getattr(config, name) for name in AS_GIVEN},
        **{f"{package}_version": version(package) for package in ("torch", "transformers")},
    }
    return Manifest(
        d_model=model.d_model,
        layers=layers,
        precision=config.precision,
        step_divisor=config.step_divisor if config.precision == "int8" else 0.0,
        window=config.window,
        seed=config.shuffle_seed,
        world_size=config.world_size,
        source=source,
    )


def whereabouts(name: str | Path) -> str:
    """An absolute path of what lies on this machine; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
