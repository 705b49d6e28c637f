"""What held-out numbers take beside weights, optimiser state and training's buffers: a formula of sizes."""

from typing import NamedTuple

from ..cache_format.layout import SITES, vector_bytes
from .memory import BYTES, CODE_INDEX_BYTES
from .shape import Shape

HELD_OUT_TOKENS = 2048
"""That are decoded and measured at a time."""


class HeldOutMemory(NamedTuple):
    """Bytes while split val is read: no gradients, no batches of a step."""

    codes: int
    """Of all sources"""
    values: int
    """A layer's pre-activations; or what each source writes to one target, twice, beside error and truth"""
    rows: int
    """Stored numbers, on the host: those that are decoded, those that are measured, those before them."""


def held_out_memory(shape: Shape, layers: int, precision: str, dtype: str = "float32") -> HeldOutMemory:
    """layers: that this process reads; shape: with an assumed k, where the activation has none."""
    tokens, work = HELD_OUT_TOKENS, max(BYTES[dtype], 4)
    sources = min(shape.n_targets, shape.n_layers)
    dense = max(shape.d_model + shape.n_latents, (2 * sources + 3) * shape.d_model)
    return HeldOutMemory(
        codes=tokens * sum(shape.layer_k) * (work + CODE_INDEX_BYTES),
        values=tokens * dense * work,
        rows=3 * tokens * len(SITES) * layers * vector_bytes(shape.d_model, precision == "int8"),
    )
