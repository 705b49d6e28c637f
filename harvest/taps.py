"""Hooks that hand on what MLPs read and wrote. Knows modules; no model, no disk."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Receive = Callable[[str, int, Tensor], None]
"""Given site, index of the MLP, and (sample, position, d_model); the tensor may be changed afterwards."""


class LastLayerReached(Exception):
    """Raised inside the forward pass once the last tap has what it wants."""


class MlpTaps:
    """While entered, each forward pass of `run` hands on what the MLPs read and wrote.

    mlps: the modules, in layer order. norms: for input site resid_mid, the norm in front of each; its input
    is kept instead of the MLP's, after a check that its output is indeed what the MLP reads.
    """

    def __init__(self, mlps: Sequence[nn.Module], norms: Sequence[nn.Module] | None = None) -> None:
        self._mlps, self._norms = mlps, norms
        self._handles: list[RemovableHandle] = []
        self._receive: Receive | None = None
        self._ran = 0
        self._before: tuple[Tensor, Tensor] | None = None
        self._checked = 0
        """MLPs that were seen to read what their norm gives: asking again would make a device wait."""

    def __enter__(self) -> "MlpTaps":
        for number, mlp in enumerate(self._mlps):
            last = number == len(self._mlps) - 1
            self._handles.append(mlp.register_forward_hook(self._mlp_hook(number, last), with_kwargs=True))
            if self._norms is not None:
                self._handles.append(self._norms[number].register_forward_hook(self._norm_hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, body: nn.Module, inputs: dict[str, Any], receive: Receive) -> None:
        """One forward pass, as far as the last MLP."""
        self._receive, self._ran, self._before = receive, 0, None
        try:
            with torch.inference_mode():
                body(**inputs, use_cache=False)
        except LastLayerReached:
            pass
        assert self._ran == len(self._mlps), "an MLP did not run"

    def _mlp_hook(self, number: int, last: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given, said = read_and_said(module, args, kwargs, output)
            if self._norms is not None:
                assert self._before is not None, "the norm in front did not run"
                residual, normed = self._before
                if number >= self._checked and normed is not given and not torch.equal(normed, given):
                    raise ValueError(
                        f"--input-site resid_mid: {type(module).__name__} does not read what the norm before "
                        "it gives; harvest --input-site mlp_in"
                    )
                self._checked = max(self._checked, number + 1)
                given, self._before = residual, None
            assert self._receive is not None
            self._receive("mlp_in", number, given)
            self._receive("mlp_out", number, said)
            self._ran += 1
            if last:
                raise LastLayerReached

        return hook

    def _norm_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._before = (args[0], output)


def read_and_said(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor]:
    """The one tensor that an MLP reads, and the one it adds to the residual stream (of a tuple, the first).

    ValueError that names the class where it reads more: such a module adds the residual stream itself, or
    reads the other stream as well, and no function of its input alone could stand in for it.
    """
    read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    said = output[0] if isinstance(output, tuple) and output else output
    if len(read) != 1 or not isinstance(said, Tensor) or said.shape != read[0].shape:
        shapes = ", ".join(str(list(value.shape)) for value in read)
        given = str(list(said.shape)) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(
            f"{type(module).__name__} reads tensors of shape {shapes or 'none'} and returns {given}; "
            "expected one tensor and another of its shape; name another module with --mlp"
        )
    return read[0], said
