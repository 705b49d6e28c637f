"""Gradients of decoders while targets are decoded: held while they grow, then handed over and gone."""

from collections.abc import Callable
from types import EllipsisType

import torch
from torch import Tensor

from .cpu_codes import Tiles
from .exchange import Exchange
from .losses import Penalties
from .micro_batch import MicroBatch
from .placement import Placement
from .sparse import Codes, rows_of
from .transcoder import CrossLayerTranscoder, Term

Apply = Callable[[str, int, dict[str, Tensor]], None]
"""Told (kind of layer: "decoder" or "encoder", its place, gradients by parameter) once these are final."""


class Room:
    """Memory for gradients, used again and again: on a CPU new pages cost more than the products."""

    def __init__(self, model: CrossLayerTranscoder) -> None:
        self.largest = max(weight.numel() for weight in (*model.W_dec, *model.W_enc))
        self.free: list[Tensor] = []
        self.dtype = model.inputs.mean.dtype

    def take(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a weight; what is in it has no meaning."""
        flat = self.free.pop() if self.free else weight.new_empty(self.largest, dtype=self.dtype)
        return flat[: weight.numel()].view_as(weight)

    def give_back(self, grad: Tensor) -> None:
        self.free.append(grad.new_empty(0).set_(grad.untyped_storage()))


class DecoderGrads:
    """Gradients of the decoders that later targets still add to."""

    def __init__(
        self,
        model: CrossLayerTranscoder,
        exchange: Exchange,
        apply: Apply,
        penalties: Penalties,
        room: Room,
        placement: Placement,
    ) -> None:
        self.model, self.exchange, self.placement = model, exchange, placement
        self.apply, self.penalties, self.room = apply, penalties, room
        self.held: dict[int, dict[str, Tensor]] = {}
        self.written: set[tuple[int, int | EllipsisType]] = set()

    def begin(self, target: int) -> None:
        self.placement.begin(target)
        names = self.model.names("decoder")
        own = {name: torch.zeros_like(getattr(self.model, name)[target]) for name in names[1:]}
        self.held[target] = own | self.held.get(target, {})
        for source in self.model.shape.sources(target):
            layer, _ = self.model.shape.decoder_place(source, target)
            if "W_dec" not in self.held.setdefault(layer, {}):
                self.held[layer]["W_dec"] = self.room.take(self.model.W_dec[layer])

    def add(self, target: int, part: MicroBatch, grad: Tensor, terms: list[Term]) -> None:
        """One micro-batch's, and its codes', from `grad` (token, d_model) of the standardised output."""
        mine = self.held[target]
        mine["b_dec"] += grad.sum(dim=0)
        if self.model.shape.skip:
            mine["W_skip"].addmm_(grad.T, part.inputs(target))
        self.add_terms(grad, terms, part.codes, part.code_grads)

    def add_terms(
        self, grad: Tensor, terms: list[Term], codes: dict[int, Codes], code_grads: dict[int, Tensor]
    ) -> None:
        """Those of W_dec, and of each source's codes."""
        rows: Tensor | Tiles | None = None
        for term in terms:
            place, weight = (term.layer, term.slot), self.model.term_weight(term)
            whole, add = self.held[term.layer]["W_dec"][term.slot], place in self.written
            rows = rows_of(grad, weight) if rows is None else rows
            if len(term.sources) == 1:
                source = term.sources[0]
                codes[source].gradients(rows, weight, whole, code_grads[source], add=add)
            else:
                for source, part in zip(
                    term.sources, term.merged.gradients(rows, weight, whole, add=add), strict=True
                ):
                    code_grads[source] += part
            self.written.add(place)

    def finish(self, target: int) -> None:
        """Hand over those that no target after this one adds to."""
        for source in self.model.shape.sources(target):
            penalty = self.penalties.decoder_grad(source, self.model.decoder(source, target))
            if penalty is not None:
                layer, slot = self.model.shape.decoder_place(source, target)
                self.held[layer]["W_dec"][slot] += penalty
        for layer in [held for held in self.held if self.model.shape.last_target(held) == target]:
            if layer not in self.exchange.shared:
                self._hand_over(layer)

    def finish_shared(self) -> None:
        """Decoders that several ranks use: gradients go to the owner, and its new weights to the others."""
        for layer, users in self.exchange.shared.items():
            weight = self.model.W_dec[layer].data
            if layer in self.model.own:
                total = self.held[layer]["W_dec"]
                for shard in users:
                    total += self.exchange.received(total, shard)
                self._hand_over(layer)
                for shard in users:
                    self.exchange.send(weight, shard)
            elif layer in self.held:
                grad = self.held.pop(layer)["W_dec"]
                self.exchange.send(grad, self.exchange.owner(layer))
                self.room.give_back(grad)
                weight.copy_(self.exchange.received(weight, self.exchange.owner(layer)))

    def _hand_over(self, layer: int) -> None:
        grads = self.held.pop(layer)
        self.apply("decoder", layer, grads)
        self.placement.end(layer)
        self.room.give_back(grads["W_dec"])
