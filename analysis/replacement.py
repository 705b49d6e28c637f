"""A model whose MLPs are replaced by a transcoder while it runs, or by what is to be compared with it.

original    nothing is changed; with `record`, the errors y - y_hat are kept
transcoder  layer t's MLP writes y_hat_t, computed from what the layers read in this very run
errors      y_hat_t of this run plus the recorded error: everything must stay as it was
mean, zero  the MLP writes its mean over the cache, or nothing
edit        y + (y_hat with edited latents - y_hat): the model as it is, but for the edit
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..harvest.taps import read_and_said
from ..train.sparse import Codes
from ..train.transcoder import CrossLayerTranscoder

MODES = ("original", "transcoder", "errors", "mean", "zero", "edit")


class Edit(NamedTuple):
    """A latent that is held at a value: 0 to ablate it."""

    place: int
    """Layer, counted in the transcoder"""
    latent: int
    value: float


class Replacement:
    """Hooks on the MLPs of the transcoder's layers; while entered, they do what `mode` says.

    mlps, and for input site resid_mid the norms before them: of the transcoder's layers, in order.
    left (batch, position) or None: positions whose MLPs stay, such as BOS, which most runs exclude. Passes
    with another number of positions, as of a generated token, replace all.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        mlps: Sequence[nn.Module],
        norms: Sequence[nn.Module] | None = None,
        edits: Sequence[Edit] = (),
    ) -> None:
        self.transcoder, self.edits = transcoder, edits
        self._mlps, self._norms = mlps, norms
        self.mode, self.record = "original", False
        self.left: Tensor | None = None
        self.norms: list[Tensor] = []
        """(batch, position) of what each layer read, in the last recorded pass"""
        self._errors: dict[int, Tensor] = {}
        self._codes: dict[int, Codes] = {}
        self._edited: dict[int, Codes] = {}
        self._residual: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Replacement":
        for place, mlp in enumerate(self._mlps):
            self._handles.append(mlp.register_forward_hook(self._hook(place), with_kwargs=True))
            if self._norms is not None:
                self._handles.append(self._norms[place].register_forward_pre_hook(self._keep_residual))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep_residual(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._residual = args[0]

    def _hook(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given, said = read_and_said(module, args, kwargs, output)
            if self._norms is not None:
                assert self._residual is not None
                given = self._residual
            if self.mode == "original" and not self.record:
                return None
            changed = self._change(place, given, said)
            if changed is None:
                return None
            if self.left is not None and self.left.shape == said.shape[:2]:
                changed = torch.where(self.left[..., None], said, changed)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _change(self, place: int, given: Tensor, output: Tensor) -> Tensor | None:
        """(batch, position, d_model) of what the MLP is to write; None: what it wrote."""
        outputs = self.transcoder.outputs
        if self.mode == "zero":
            return torch.zeros_like(output)
        if self.mode == "mean":
            return outputs.mean[place].to(output.dtype).expand_as(output)
        predicted = self._predict(place, given, self._codes, edited=False)
        if self.mode == "original":
            self.norms = [*(self.norms if place else []), given.float().norm(dim=-1)]
            self._errors[place] = output.double() - predicted.double()  # exact, whatever the sizes of the two
            return None
        if self.mode == "errors":
            predicted = predicted.double() + self._errors[place]
        if self.mode == "edit":
            without, predicted = predicted, self._predict(place, given, self._edited, edited=True)
            predicted = predicted.double() + (output.double() - without.double())
        return predicted.to(output.dtype)

    def _predict(self, place: int, given: Tensor, codes: dict[int, Codes], edited: bool) -> Tensor:
        """(batch, position, d_model) in model units; keeps the layer's codes for later targets."""
        model = self.transcoder
        rows = given.reshape(-1, given.shape[-1]).to(model.inputs.mean.dtype, copy=True)
        standard = model.inputs.apply_to(rows, place)
        codes[place] = model.encode_layer(standard, place)
        if edited:
            codes[place] = self._edit(codes[place], place)
        written = model.decode_terms(model.terms(codes, place), place)
        if model.shape.skip:
            written.addmm_(standard, model.W_skip[place].T)
        return model.outputs.undo(written, place).view(*given.shape[:-1], -1)

    def _edit(self, codes: Codes, place: int) -> Codes:
        mine = [edit for edit in self.edits if edit.place == place]
        if not mine:
            return codes
        dense = codes.dense()
        for edit in mine:
            dense[:, edit.latent] = edit.value
        return Codes.at(dense != 0, dense)


def parse_edits(
    ablate: Sequence[str], steer: Sequence[str], layers: Sequence[int], latents: int
) -> list[Edit]:
    """`layer:latent` and `layer:latent=value`, layers by their number in the model."""
    edits = []
    for option, texts in (("--ablate", ablate), ("--steer", steer)):
        for text in texts:
            where, _, value = text.partition("=")
            layer, _, latent = where.partition(":")
            try:
                edit = Edit(layers.index(int(layer)), int(latent), float(value or "nan"))
            except ValueError:
                edit = None
            if edit is None or not 0 <= edit.latent < latents or (option == "--steer") != bool(value):
                form = "layer:latent" if option == "--ablate" else "layer:latent=value"
                raise ValueError(
                    f"{option}: expected {form} with a layer of {list(layers)} and a latent below {latents}, "
                    f"found {text!r}"
                )
            edits.append(edit if value else edit._replace(value=0.0))
    return edits
