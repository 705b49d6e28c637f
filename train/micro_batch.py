"""One micro-batch of a step: its values, made when they are asked for, and its codes with their gradients."""

from torch import Tensor

from .reader import Batch
from .sparse import Codes
from .transcoder import CrossLayerTranscoder


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
        mean = self.model.inputs.mean
        return self.model.inputs.apply_to(self.batch.values("mlp_in", layer, mean.device, mean.dtype), layer)

    def targets(self, layer: int) -> Tensor:
        mean = self.model.outputs.mean
        return self.model.outputs.apply_to(
            self.batch.values("mlp_out", layer, mean.device, mean.dtype), layer
        )
