"""Batches through the model, in portions that fit into its memory."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .batches import collate, cut, padded_tokens
from .model import LoadedModel
from .taps import MlpTaps
from .tokens import PreparedSample

Values = dict[str, npt.NDArray[Any]]
"""By site (token, layer, d_model): float32, or uint16 holding bf16 bits."""


class Forward:
    """budget: tokens of a forward pass, padding included; it falls when memory does not suffice."""

    def __init__(self, model: LoadedModel, taps: MlpTaps, budget: int) -> None:
        self._model, self._taps, self.budget = model, taps, budget
        self._dtype = next(model.body.parameters()).dtype

    def compute(self, samples: list[PreparedSample]) -> Iterator[tuple[list[PreparedSample], Values]]:
        """What the MLPs read and wrote; samples that do not fit are halved and tried again, once."""
        for part in cut(samples, self.budget):
            values = self._try(part)
            if values is not None:
                yield part, values
                continue
            self._lower(part)
            for half in cut(part, self.budget):
                values = self._try(half)
                if values is None:
                    raise ValueError(
                        f"half a batch, {padded_tokens(half)} tokens of {len(half)} samples, does not fit "
                        "into memory either; lower --batch-tokens or --ctx-len"
                    )
                yield half, values

    def _try(self, samples: list[PreparedSample]) -> Values | None:
        """None where memory does not suffice."""
        batch = collate(samples)
        try:
            inputs = {name: self._to_device(value) for name, value in batch.inputs.items()}
            return self._taps.run(self._model.body, inputs, batch.keep.to(self._model.device))
        except torch.OutOfMemoryError:
            pass  # what the fault's frames hold is free only behind this block
        torch.cuda.empty_cache()
        return None

    def _lower(self, samples: list[PreparedSample]) -> None:
        tokens = padded_tokens(samples)
        self.budget = tokens // 2
        print(
            f"harvest: {tokens} tokens do not fit into memory; going on with {self.budget} a forward pass",
            file=sys.stderr,
            flush=True,
        )

    def _to_device(self, value: torch.Tensor) -> torch.Tensor:
        """Pictures also take the model's number type."""
        return value.to(self._model.device, self._dtype if value.is_floating_point() else None)


def check_finite(sample: PreparedSample, values: Values, layers: tuple[int, ...]) -> None:
    """ValueError that names sample, layer and site where the model gave NaN or infinity."""
    for site, value in values.items():
        if value.dtype == np.uint16:
            exponent = np.uint16(0x7F80)
            faulty = ((value & exponent) == exponent).any(axis=2)
        else:
            faulty = ~np.isfinite(value).all(axis=2)
        if faulty.any():
            token, layer = np.argwhere(faulty)[0]
            raise ValueError(
                f"sample {sample.line['id']!r}, layer {layers[layer]}, {site}: the model gave NaN or "
                f"infinity at position {sample.columns['position'][token]}; look at the sample, or "
                "harvest with --dtype float32 or bfloat16"
            )
