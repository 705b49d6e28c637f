"""How many layers of which width a model has, from its config.json; transformers is asked only at need."""

import json
from pathlib import Path
from typing import Any, NamedTuple

WIDTH_NAMES = ("hidden_size", "n_embd", "d_model")
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers")
INNER_NAMES = ("text_config", "language_config", "llm_config")
"""Where configs of models that see keep that of their language model."""
FAMILY_DEFAULTS = {"llama": (4096, 32), "mistral": (4096, 32), "qwen2": (4096, 32)}
"""(width, layers) that transformers takes where a config leaves them out, as LLaVA-1.5's does."""


class ModelSize(NamedTuple):
    d_model: int
    n_layers: int


def read_model_size(model: str) -> ModelSize:
    """Sizes of the language model in a folder, a config.json, or of a hub id (that needs transformers)."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as fault:
            raise ValueError(f"{path}: expected JSON, found none ({fault})") from fault
        return parse_model_size(config, path)
    if model.startswith((".", "/", "~")) or Path(model).exists():
        raise ValueError(f"model {model!r}: expected a folder with a config.json, or a hub id; found neither")
    return _ask_transformers(model)


def parse_model_size(config: object, path: Path) -> ModelSize:
    """From the JSON of a config; ValueError where it has no sizes."""
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, found {type(config).__name__}")
    inner = next((config[name] for name in INNER_NAMES if isinstance(config.get(name), dict)), config)
    default = FAMILY_DEFAULTS.get(str(inner.get("model_type")), (None, None))
    width = _first(inner, WIDTH_NAMES, default[0])
    depth = _first(inner, DEPTH_NAMES, default[1])
    if width is None or depth is None:
        raise ValueError(
            f"{path}: expected {WIDTH_NAMES[0]} and {DEPTH_NAMES[0]} in it or in its {INNER_NAMES[0]}, "
            f"found {', '.join(sorted(inner))[:200]}"
        )
    return ModelSize(width, depth)


def _first(config: dict[str, Any], names: tuple[str, ...], default: int | None) -> int | None:
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive number, found {value!r}")
            return value
    return default


def _ask_transformers(model: str) -> ModelSize:
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(
            f"model {model!r} is no folder here, and reading a hub id's config needs transformers; "
            "pip install 'clt-cache[harvest]', or name a folder that holds its config.json"
        ) from None
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as fault:
        raise ValueError(f"model {model!r}: {' '.join(str(fault).split())}") from fault
    return ModelSize(int(config.hidden_size), int(config.num_hidden_layers))
