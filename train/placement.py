"""Where decoders and their optimiser state are: on the device, or away from it and brought when they are due.

A target-major step reads and updates a layer's decoders between `begin` and `end`, and at no other time. So
they can live in host memory, or in a mapped file, and pass through the device: while one layer is at work the
one before it goes home and the one after it comes, by a thread, on CUDA on a stream of its own. What a step
computes is the same, bit for bit.
"""

import errno
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .optimizer import Optimizer
from .transcoder import CrossLayerTranscoder, Zeros

Parts = dict[str, Tensor]
"""A layer's decoders and their state: `W_dec`, `W_dec.exp_avg` and so on."""


class Placement:
    """All decoders on the device, all the time."""

    def start(self) -> None:
        """A step begins."""

    def begin(self, layer: int) -> None:
        """The layer's decoders are needed on the device."""

    def end(self, layer: int) -> None:
        """They were updated, and are not needed any more in this step."""

    def settle(self) -> None:
        """The step ends: home is up to date when this returns."""


ON_DEVICE = Placement()


class Offload(Placement):
    """Decoders and skips of the model, and their state, live where the model has them now.

    Between steps the model's parameters and the optimiser's state are those at home; from `begin` to `end`
    they are views of room on the device. There is room for the layers that are at work and for one more.
    """

    def __init__(self, model: CrossLayerTranscoder, optimizer: Optimizer, zeros: Zeros) -> None:
        self._model, self._optimizer = model, optimizer
        self._names = away_names(model)
        self._home = {layer: self._settle_in(layer, zeros) for layer in model.own}
        at_work = model.shape.n_targets if model.shape.tie == "source" else 1
        count = min(at_work + 1, len(model.own))
        self._free = [self._room(model.inputs.mean.device) for _ in range(count)]
        self._mover = _Mover(model.inputs.mean.device)
        self._coming: dict[int, tuple[Parts, Future[None]]] = {}
        self._here: dict[int, Parts] = {}
        self._going: list[Future[None]] = []

    @property
    def device_bytes(self) -> int:
        """Of the room on the device."""
        return sum(part.numel() * part.element_size() for room in self._free for part in room.values())

    def start(self) -> None:
        self._fetch(self._model.own[0])

    def begin(self, layer: int) -> None:
        self._fetch(layer)
        room, coming = self._coming.pop(layer)
        coming.result()
        self._here[layer] = room
        self._use(layer, {key: _view(room[key], part) for key, part in self._home[layer].items()})
        if later := [other for other in self._model.own if other > layer]:
            self._fetch(later[0])

    def end(self, layer: int) -> None:
        room, home = self._here.pop(layer), self._home[layer]
        pairs = [(_view(room[key], part), part) for key, part in home.items()]
        self._going.append(self._mover.copy(pairs))
        self._use(layer, home)
        self._free.append(room)  # the mover fills it only after it has emptied it

    def settle(self) -> None:
        for going in self._going:
            going.result()
        self._going.clear()

    def _fetch(self, layer: int) -> None:
        """Let the layer come, unless it is on its way."""
        if layer not in self._coming:
            room, home = self._free.pop(), self._home[layer]
            pairs = [(part, _view(room[key], part)) for key, part in home.items()]
            self._coming[layer] = room, self._mover.copy(pairs)

    def _use(self, layer: int, parts: Parts) -> None:
        for name in self._names:
            getattr(self._model, name)[layer].data = parts[name]
            start = f"{name}."
            state = {key.removeprefix(start): part for key, part in parts.items() if key.startswith(start)}
            self._optimizer.set_state(name, layer, state)

    def _settle_in(self, layer: int, zeros: Zeros) -> Parts:
        """What lives at home: weights do already, the first state moves in."""
        parts = {}
        for name in self._names:
            parts[name] = getattr(self._model, name)[layer].data
            for key, first in self._optimizer.state_of(name, layer).items():
                parts[f"{name}.{key}"] = zeros(tuple(first.shape), first.dtype).copy_(first)
        self._use(layer, parts)
        return parts

    def _room(self, device: torch.device) -> Parts:
        """As much of each part as the largest layer has."""
        sizes: dict[str, Tensor] = {}
        for parts in self._home.values():
            for key, part in parts.items():
                if key not in sizes or part.numel() > sizes[key].numel():
                    sizes[key] = part
        return {key: torch.empty(p.numel(), dtype=p.dtype, device=device) for key, p in sizes.items()}


class _Mover:
    """Copies in the order they were asked for, beside the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, "clt-offload")
        self._device, self._stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Future[None]:
        """From, to: after what the device was told to do until now."""
        on_cuda = self._stream is not None
        ready = torch.cuda.current_stream(self._device).record_event() if on_cuda else None
        return self._thread.submit(self._copy, pairs, ready)

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Tensor]], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            for old, new in pairs:
                new.copy_(old)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for old, new in pairs:
                new.copy_(old, non_blocking=True)
        self._stream.synchronize()


def away_names(model: CrossLayerTranscoder) -> list[str]:
    """Parameters that do not stay on the device: matrices of decoders; their biases are small."""
    return [name for name in model.names("decoder") if name != "b_dec"]


def zeros_on_host(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In memory that a GPU can reach by itself, where there is one."""
    return torch.zeros(size, dtype=dtype, pin_memory=torch.cuda.is_available())


def zeros_on_disk(folder: Path) -> Zeros:
    """In files of that folder, mapped. Once mapped they have no name any more, so that they go with the
    process, however it ends. Their room is taken at once: OSError where there is too little.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = torch.Size(size).numel()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".offload-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            except OSError as fault:
                if fault.errno != errno.ENOSPC:
                    raise
                raise OSError(fault.errno, fault.strerror, os.fspath(folder)) from None
            return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(size)

    return zeros


def move(model: CrossLayerTranscoder, device: torch.device, *, leave: list[str]) -> CrossLayerTranscoder:
    """The model to the device, but for the parameters named in `leave`."""
    for name, module in model.named_children():
        if name not in leave:
            module.to(device)
    for name, buffer in list(model.named_buffers(recurse=False)):
        setattr(model, name, buffer.to(device))
    return model


def _view(flat: Tensor, like: Tensor) -> Tensor:
    return flat[: like.numel()].view(like.shape)
