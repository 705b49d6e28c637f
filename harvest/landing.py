"""Where activations land: host memory that is used in turn, filled while the model runs.

On a CUDA device a side stream quantises (or rounds to bfloat16) and copies into pinned memory while the
model's own stream goes on. On a CPU they are quantised while they lie in its cache, by the codec's compiled
loops; where there are none, they are copied as they are, and the cache's writer quantises them.
"""

import queue
import sys
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache_format.compiled import COMPILED
from ..cache_format.int8 import slabs
from ..cache_format.manifest import Manifest
from ..cache_format.window import StoredVectors, Values
from ..stopwatch import Stopwatch
from .quantiser import DeviceVectors, agrees, form_of, quantise_on_device, quantise_on_host

BERTHS = 3
"""Batches in host memory: one is filled while others are stored."""


class Form(NamedTuple):
    """As what activations come to the host."""

    divisor: float | None
    """Quantised where they are, with this divisor; None: not quantised."""
    rounded: bool
    """As bfloat16; neither: as the model gives them, float16 as float32."""


AS_THEY_ARE = Form(None, False)


def choose_form(manifest: Manifest, device: torch.device) -> Form:
    """What the cache stores, made on the device; on a CPU, where no loops are compiled, by the writer."""
    if device.type == "cpu":
        quick = COMPILED and manifest.precision == "int8"
        return Form(manifest.step_divisor, False) if quick else AS_THEY_ARE
    if manifest.precision == "bf16":
        return Form(None, True)
    if agrees(device, manifest.d_model, manifest.step_divisor):
        return Form(manifest.step_divisor, False)
    print(
        f"harvest: {device} does not round as the cache's codec does; its values are quantised on the host",
        file=sys.stderr,
        flush=True,
    )
    return AS_THEY_ARE


class Berth:
    """Host memory of one batch; it grows, and is never given back."""

    def __init__(self, n_layers: int, pinned: bool) -> None:
        self._n_layers, self._pinned = n_layers, pinned
        self._flat: dict[str, Tensor] = {}

    def room(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """(layer, *shape), not initialised; the same memory for the same name."""
        size = self._n_layers * shape.numel()
        if name not in self._flat or self._flat[name].numel() < size or self._flat[name].dtype != dtype:
            self._flat[name] = torch.empty(size, dtype=dtype, pin_memory=self._pinned)
        return self._flat[name][:size].view(self._n_layers, *shape)


class Landed:
    """One batch's activations; wait, take `values`, and `release` the memory."""

    def __init__(self, landing: "Landing", berth: Berth, rooms: dict[str, dict[str, Tensor]]) -> None:
        self._landing, self._berth, self._rooms = landing, berth, rooms
        self._computed, self._copied = landing.record_events()

    def wait_computed(self) -> None:
        for event in self._computed:
            event.synchronize()

    def wait_copied(self) -> None:
        for event in self._copied:
            event.synchronize()

    def values(self) -> Values:
        """By site, (token, layer, ...) as views of layer-major memory, which is how the cache stores it."""
        self.wait_copied()
        found: Values = {}
        for site, rooms in self._rooms.items():
            arrays = {name: _by_token(tensor) for name, tensor in rooms.items()}
            found[site] = arrays["values"] if "values" in arrays else StoredVectors(**arrays)
        return found

    def release(self) -> None:
        self._landing.free(self._berth)


class Landing:
    """Takes what the taps bring, one batch after the other, and waits where no memory is free."""

    def __init__(self, n_layers: int, form: Form, device: torch.device, watch: Stopwatch) -> None:
        self._form, self._watch = form, watch
        self._free: queue.LifoQueue[Berth] = queue.LifoQueue()  # memory that was never touched is dear
        for _ in range(BERTHS):
            self._free.put(Berth(n_layers, pinned=device.type == "cuda"))
        self._flying: deque[Landed] = deque(maxlen=BERTHS)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, keep: Tensor) -> None:
        """A batch comes, of which `keep` (sample, position), on the host, is stored."""
        self._berth = self._next_berth()
        self._rooms: dict[str, dict[str, Tensor]] = {}
        flat = keep.flatten()
        self._rows = None if flat.all() else flat.nonzero()[:, 0].contiguous()
        self._rows_on: dict[torch.device, Tensor] = {}

    def put(self, site: str, index: int, values: Tensor) -> None:
        """Keep the chosen rows of the index-th layer; values: (sample, position, d_model), or both in one."""
        with self._watch.measure("copy"):
            flat = values.detach().reshape(-1, values.shape[-1])
            if flat.device.type == "cpu" and self._form == AS_THEY_ARE and flat.dtype != torch.float16:
                self._copy_once(site, index, flat)
                return
            if flat.device.type == "cpu" and self._form.divisor is not None and COMPILED:
                self._quantise_once(site, index, flat, self._form.divisor)
                return
            rows = self._chosen(flat)
            with self._aside(rows):
                for name, tensor in self._formed(rows).items():
                    room = self._room(site, name, tensor.shape, tensor.dtype)
                    room[index].copy_(tensor, non_blocking=True)

    def finish(self) -> Landed:
        """The batch is through the model."""
        landed = Landed(self, self._berth, self._rooms)
        self._flying.append(landed)
        return landed

    def abandon(self) -> None:
        """The batch is not: its memory is free."""
        self.free(self._berth)

    def free(self, berth: Berth) -> None:
        self._free.put(berth)

    def record_events(self) -> tuple[list[torch.cuda.Event], list[torch.cuda.Event]]:
        """Of all that was asked of the devices so far: by the model, and aside."""
        computed = [torch.cuda.current_stream(device).record_event() for device in self._streams]
        return computed, [stream.record_event() for stream in self._streams.values()]

    def _next_berth(self) -> Berth:
        """Waits for the batch that flies longest: its device, its copies, those who store it."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            oldest = self._flying[0]
        with self._watch.measure("device"):
            oldest.wait_computed()
        with self._watch.measure("copy"):
            oldest.wait_copied()
        with self._watch.measure("store"):
            return self._free.get()

    def _room(self, site: str, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        rooms = self._rooms.setdefault(site, {})
        if name not in rooms:
            rooms[name] = self._berth.room(f"{site} {name}", shape, dtype)
        return rooms[name]

    def _copy_once(self, site: str, index: int, flat: Tensor) -> None:
        """Choose rows on the way into their place."""
        tokens = len(flat) if self._rows is None else len(self._rows)
        room = self._room(site, "values", torch.Size((tokens, flat.shape[1])), flat.dtype)
        if self._rows is None:
            room[index].copy_(flat)
        else:
            torch.index_select(flat, 0, self._rows, out=room[index])

    def _quantise_once(self, site: str, index: int, flat: Tensor, divisor: float) -> None:
        """Into their place: no new memory is taken, and what is read lies in a cache still."""
        tokens, width = len(flat) if self._rows is None else len(self._rows), flat.shape[1]
        shapes = form_of(tokens, width)
        rooms = {name: self._room(site, name, torch.Size(s), dtype) for name, (s, dtype) in shapes.items()}
        place = DeviceVectors(**{name: room[index] for name, room in rooms.items()})
        if flat.dtype == torch.float32:
            quantise_on_host(flat, divisor, place, self._rows)
            return
        for part in slabs(tokens, width):  # as float32, few rows at a time
            rows = flat[part] if self._rows is None else flat.index_select(0, self._rows[part])
            quantise_on_host(rows, divisor, place.rows(part))

    def _chosen(self, flat: Tensor) -> Tensor:
        """(row, d_model): own memory where it is read later than now."""
        if self._rows is None:
            return flat if flat.device.type == "cpu" else flat.clone()  # the model may go on in place
        if flat.device not in self._rows_on:
            self._rows_on[flat.device] = self._rows.to(flat.device)
        return flat.index_select(0, self._rows_on[flat.device])

    def _formed(self, rows: Tensor) -> dict[str, Tensor]:
        if self._form.divisor is not None:
            return quantise_on_device(rows, self._form.divisor)._asdict()
        if self._form.rounded:
            return {"values": rows.to(torch.bfloat16)}
        return {"values": rows.float() if rows.dtype == torch.float16 else rows}

    def _aside(self, rows: Tensor) -> AbstractContextManager[Any]:
        """The side stream of the rows' device, once they are computed."""
        if rows.device.type != "cuda":
            return nullcontext()
        stream = self._streams.get(rows.device)
        if stream is None:
            stream = self._streams[rows.device] = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        rows.record_stream(stream)
        return torch.cuda.stream(stream)


def _by_token(tensor: Tensor) -> npt.NDArray[Any]:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return np.moveaxis(bits.numpy(), 0, 1)
