"""Hooks that keep what MLPs read and wrote. Knows modules and masks; no model, no disk."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LastLayerReached(Exception):
    """Raised inside the forward pass once the last tap has what it wants."""


class MlpTaps:
    """While entered, each forward pass leaves its kept rows in `take()`.

    mlps: the modules, in layer order. norms: for input site resid_mid, the norm in front of each; its input
    is kept instead of the MLP's, after a check that its output is indeed what the MLP reads.
    """

    def __init__(self, mlps: Sequence[nn.Module], norms: Sequence[nn.Module] | None = None) -> None:
        self._mlps, self._norms = mlps, norms
        self._handles: list[RemovableHandle] = []
        self._keep: Tensor | None = None
        self._kept: dict[str, list[Tensor]] = {"mlp_in": [], "mlp_out": []}
        self._before: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> "MlpTaps":
        for number, mlp in enumerate(self._mlps):
            last = number == len(self._mlps) - 1
            self._handles.append(mlp.register_forward_hook(self._mlp_hook(last), with_kwargs=True))
            if self._norms is not None:
                self._handles.append(self._norms[number].register_forward_hook(self._norm_hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, body: nn.Module, inputs: dict[str, Any], keep: Tensor) -> dict[str, npt.NDArray[Any]]:
        """One forward pass; by site (token, layer, d_model) of the rows in `keep` (batch, position).

        float32, or uint16 bits where the model computes in bfloat16; rows in batch order.
        """
        self._keep = keep
        for kept in self._kept.values():
            kept.clear()
        try:
            with torch.inference_mode():
                body(**inputs, use_cache=False)
        except LastLayerReached:
            pass
        assert all(len(kept) == len(self._mlps) for kept in self._kept.values()), "an MLP did not run"
        return {site: _to_numpy(kept) for site, kept in self._kept.items()}

    def _mlp_hook(self, last: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{type(module).__name__} returns {type(output).__name__}; expected one tensor"
                )
            if self._before is not None:
                residual, normed = self._before
                if not torch.equal(normed, given):
                    raise ValueError("resid_mid: the MLP does not read what the norm before it gives")
                given, self._before = residual, None
            self._put("mlp_in", given)
            self._put("mlp_out", output)
            if last:
                raise LastLayerReached

        return hook

    def _norm_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._before = (args[0], output)

    def _put(self, site: str, values: Tensor) -> None:
        assert self._keep is not None
        self._kept[site].append(values[self._keep].detach())


def _to_numpy(layers: list[Tensor]) -> npt.NDArray[Any]:
    """(token, layer, d_model) as a view of layer-major memory, which is how the cache stores it."""
    stacked = torch.stack([layer.cpu() for layer in layers])
    if stacked.dtype == torch.bfloat16:
        array: npt.NDArray[Any] = stacked.view(torch.uint16).numpy()
    else:
        array = stacked.float().numpy()
    return np.moveaxis(array, 0, 1)
