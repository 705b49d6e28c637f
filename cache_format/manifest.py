"""What a cache is: the frozen facts that every reader needs and that a resumed harvest must agree with.

The manifest is stored as the `clt` attribute of the root group's zarr.json and never changes after the
cache was begun. It holds no token counts: those follow from the journal.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import CacheError
from .layout import BLOCK, BLOCKS, CHUNK, FORMAT_VERSION, n_blocks, vector_bytes

Scalar = str | int | float | bool | None

PRECISIONS = ("int8", "bf16")
MAX_DIMENSION = 1 << 20
"""Refuse wider models and larger windows than this: a stranger's manifest must not size our memory."""
MAX_VALUES = 1 << 24
"""Values of one token at one site; eight times those of a model of 126 layers and 16,384 channels."""
MAX_LAYERS = 4096
MAX_WORLD_SIZE = 4096
MAX_DIVISOR = 64


@dataclass(frozen=True, kw_only=True)
class Manifest:
    d_model: int
    """Width of both sites."""
    layers: tuple[int, ...]
    """Layers of the model that are stored, ascending."""
    precision: str
    """int8 (block-scaled codes) or bf16 (bit-exact)."""
    step_divisor: float
    """int8: the step of a Gaussian vector is its root mean square over this; see int8. 0 for bf16."""
    window: int
    """Tokens permuted and committed together; a multiple of CHUNK."""
    seed: int
    """Seeds the permutation inside each window."""
    world_size: int
    """Processes that write this cache; window i is written by rank i % world_size."""
    source: dict[str, Scalar]
    """Model, dataset, token selection and versions: names and hashes, compared on resume."""
    format_version: int = FORMAT_VERSION
    block: int = BLOCK
    """Channels that share one scale; 32 or 64. bf16 has no scales, and the same number."""

    def __post_init__(self) -> None:
        for name, parse in _PARSERS.items():
            parse(getattr(self, name), name)
        if self.precision not in PRECISIONS:
            raise CacheError(f"precision: expected one of {PRECISIONS}, found {self.precision!r}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise CacheError(f"layers: expected ascending layer numbers, found {_short(list(self.layers))}")
        if self.n_layers * self.d_model > MAX_VALUES:
            raise CacheError(
                f"d_model: expected at most {MAX_VALUES} values a token, "
                f"found {self.n_layers} layers of {self.d_model}"
            )
        if self.window < CHUNK or self.window % CHUNK:
            raise CacheError(f"window: expected a multiple of {CHUNK}, found {self.window}")
        if self.precision == "int8" and self.step_divisor < 1:
            raise CacheError(f"step divisor: expected 1 to {MAX_DIVISOR}, found {self.step_divisor}")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_blocks(self) -> int:
        """Scales of one vector."""
        return n_blocks(self.d_model, self.block)

    @property
    def chunks_per_window(self) -> int:
        return self.window // CHUNK

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token before entropy coding: both sites, all layers, codes and scales."""
        return 2 * self.n_layers * vector_bytes(self.d_model, self.precision == "int8", self.block)

    @property
    def bf16_bytes_per_token(self) -> int:
        return 2 * self.n_layers * 2 * self.d_model

    def layer_index(self, layer: int) -> int:
        """Place of model layer `layer` on the arrays' layer axis."""
        try:
            return self.layers.index(layer)
        except ValueError:
            raise CacheError(f"layer {layer} is not in this cache; it holds {list(self.layers)}") from None

    def to_json(self) -> dict[str, Any]:
        exact = {"layers": list(self.layers), "step_divisor": float(self.step_divisor)}
        return {**asdict(self), **exact, "chunk": CHUNK}

    def canonical(self) -> str:
        """One text for one content; its checksum stands in the journal."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def differences(self, other: "Manifest") -> list[str]:
        """`field: mine -> other's`, one line each, for every field that differs."""
        mine, theirs = self.to_json(), other.to_json()
        mine |= mine.pop("source")
        theirs |= theirs.pop("source")
        keys = sorted(mine.keys() | theirs.keys())
        return [f"{k}: {mine.get(k)!r} -> {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]


def parse_manifest(data: object) -> Manifest:
    """Check a manifest that came from disk; CacheError names the field, what it must be, and what it is."""
    if not isinstance(data, dict):
        raise CacheError(f"manifest: expected an object, found {type(data).__name__}")
    version = data.get("format_version")
    if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise CacheError(
            f"this clt reads cache format {FORMAT_VERSION}, the cache has {_short(version)}; "
            "read it with the clt that wrote it, or harvest again"
        )
    if data.get("chunk") != CHUNK:
        raise CacheError(f"chunk: format {FORMAT_VERSION} has {CHUNK}, found {_short(data.get('chunk'))}")
    unknown = data.keys() - {f.name for f in fields(Manifest)} - {"chunk"}
    if unknown:
        raise CacheError(f"manifest: expected no other fields, found {_short(sorted(unknown))}")
    return Manifest(**{name: parse(data.get(name), name) for name, parse in _PARSERS.items()})


def parse_int(data: object, name: str, low: int, high: int) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or not low <= data <= high:
        raise CacheError(f"{name}: expected an integer from {low} to {high}, found {_short(data)}")
    return data


def parse_str(data: object, name: str) -> str:
    if not isinstance(data, str):
        raise CacheError(f"{name}: expected a string, found {_short(data)}")
    return data


def _parse_layers(data: object, name: str) -> tuple[int, ...]:
    if not isinstance(data, list | tuple) or len(data) > MAX_LAYERS:
        expected = f"expected a list of at most {MAX_LAYERS} layer numbers"
        raise CacheError(f"{name}: {expected}, found {_short(data)}")
    return tuple(parse_int(item, name, 0, MAX_DIMENSION) for item in data)


def _parse_source(data: object, name: str) -> dict[str, Scalar]:
    if not isinstance(data, dict):
        raise CacheError(f"{name}: expected an object, found {_short(data)}")
    for key, value in data.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, str | int | float | bool | None) or not finite:
            raise CacheError(f"{name}.{key}: expected a string or a number, found {_short(value)}")
    return data


def _parse_divisor(data: object, name: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not 0 <= data <= MAX_DIVISOR:
        raise CacheError(f"{name}: expected a number from 0 to {MAX_DIVISOR}, found {_short(data)}")
    return float(data)


def _parse_block(data: object, name: str) -> int:
    if isinstance(data, bool) or not isinstance(data, int) or data not in BLOCKS:
        raise CacheError(f"{name}: expected one of {BLOCKS}, found {_short(data)}")
    return data


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."


_PARSERS: dict[str, Callable[[object, str], Any]] = {
    "d_model": lambda data, name: parse_int(data, name, 1, MAX_DIMENSION),
    "layers": _parse_layers,
    "precision": parse_str,
    "step_divisor": _parse_divisor,
    "window": lambda data, name: parse_int(data, name, CHUNK, MAX_DIMENSION),
    "seed": lambda data, name: parse_int(data, name, 0, 2**63 - 1),
    "world_size": lambda data, name: parse_int(data, name, 1, MAX_WORLD_SIZE),
    "source": _parse_source,
    "block": _parse_block,
}
