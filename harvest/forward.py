"""Batches through the model, in portions that fit into its memory."""

import sys
from collections.abc import Iterator

import numpy as np
import torch

from ..cache_format.window import StoredVectors, Values
from ..stopwatch import Stopwatch
from .batches import collate, cut, padded_tokens
from .landing import Landed, Landing
from .model import LoadedModel
from .taps import MlpTaps
from .tokens import PreparedSample


class Forward:
    """budget: tokens of a forward pass, padding included; it falls when memory does not suffice."""

    def __init__(
        self, model: LoadedModel, taps: MlpTaps, landing: Landing, budget: int, watch: Stopwatch
    ) -> None:
        self._model, self._taps, self._landing, self.budget = model, taps, landing, budget
        self._watch = watch
        self._dtype = model.whole.dtype

    def compute(self, samples: list[PreparedSample]) -> Iterator[tuple[list[PreparedSample], Landed]]:
        """What the MLPs read and wrote; samples that do not fit are halved and tried again, once."""
        for part in cut(samples, self.budget):
            landed = self._try(part)
            if landed is not None:
                yield part, landed
                continue
            self._lower(part)
            for half in cut(part, self.budget):
                landed = self._try(half)
                if landed is None:
                    raise ValueError(
                        f"half a batch, {padded_tokens(half)} tokens of {len(half)} samples, does not fit "
                        "into memory either; lower --batch-tokens or --ctx-len"
                    )
                yield half, landed

    def _try(self, samples: list[PreparedSample]) -> Landed | None:
        """None where memory does not suffice."""
        batch = collate(samples)
        self._landing.begin(batch.keep)
        try:
            with self._watch.measure("device"):
                inputs = {name: self._to_device(value) for name, value in batch.inputs.items()}
                self._taps.run(self._model.body, inputs, self._landing.put)
            return self._landing.finish()
        except RuntimeError as fault:
            self._landing.abandon()
            if not _is_out_of_memory(fault):
                raise
        # what the fault's frames hold is free only behind that block
        if self._model.device.type == "cuda":
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


def _is_out_of_memory(fault: RuntimeError) -> bool:
    """On a CPU, and in cuBLAS, it has no class of its own."""
    return isinstance(fault, torch.OutOfMemoryError) or any(
        text in str(fault) for text in ("can't allocate memory", "ALLOC_FAILED")
    )


def check_finite(sample: PreparedSample, values: Values, layers: tuple[int, ...]) -> None:
    """ValueError that names sample, layer and site where the model gave NaN or infinity."""
    for site, value in values.items():
        assert not isinstance(value, StoredVectors), "int8 looks for itself"
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
