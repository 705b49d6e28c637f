"""One micro-batch of a step: its values, made when they are asked for, and its codes with their gradients."""

import torch
from torch import Tensor

from ..cache_format.layout import block_of
from .cpu_codes import is_compiled, standardise
from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder, Standardiser


class MicroBatch:
    """Values of one micro-batch, made from stored numbers when asked, and its codes by source."""

    def __init__(self, model: CrossLayerTranscoder, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.codes: dict[int, Codes] = {}
        self.code_grads: dict[int, Tensor] = {}
        self.dead_codes: dict[int, Codes] = {}
        """AuxK's"""
        self.dead_code_grads: dict[int, Tensor] = {}

    def inputs(self, layer: int) -> Tensor:
        """Standardised (token, d_model), new."""
        return self._values("mlp_in", layer, self.model.inputs)

    def targets(self, layer: int) -> Tensor:
        """Standardised (token, d_model), new."""
        return self._values("mlp_out", layer, self.model.outputs)

    def _values(self, site: str, layer: int, standardiser: Standardiser) -> Tensor:
        mean = standardiser.mean
        codes, steps = self.batch.stored(site, layer)
        if codes.dtype == torch.int8 and is_compiled(mean) and not codes.is_cuda:
            block, scale = block_of(codes.shape[1], steps.shape[1]), float(standardiser.scale[layer])
            return standardise(codes, steps, mean[layer], scale, block)
        return standardiser.apply_to(self.batch.values(site, layer, mean.device, mean.dtype), layer)
