"""Batches from a cache: decoded ahead by threads, in an order that threads cannot change.

    reader = Reader(source, buffer_tokens=8192, seed=0)
    batch = reader.next(4096)          # the next 4096 tokens of the endless stream of epochs

Two buffers alternate: one is served while the other is decoded. The state is (epoch, buffer, offset).
Memory: `Reader.memory_bytes`.

With rank r of a world of n, a batch is its r-th part of n contiguous parts: side by side, the ranks' batches
are the batch of one reader alone. The state is the same for every rank and any world. Every rank decodes
every buffer: its part of one has tokens of nearly every chunk, for chunks are shuffled into each other.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache_format.layout import CHUNK, block_of
from ..cache_format.manifest import parse_int
from .batch_memory import BatchMemory
from .memory import read_memory
from .order import Ints, ReadOrder
from .source import Source, default_threads
from .stored_rows import Rows
from .window_groups import WindowGroups

_SAME = {
    "fingerprint": "give it the same caches in the same order, not harvested further since",
    "split": "read the same split",
    "selection": "give it the same --kinds, --exclude, --exclude-token-ids, --keep-kind and --order-seed",
    "seed": "give it the same --order-seed, or --seed where there was none",
    "buffer_tokens": "give it the same --buffer-tokens",
    "order": "read in the same order",
    "shuffle_windows": "give it the same --shuffle-windows",
}
"""What to do where a state does not fit."""


class Batch(NamedTuple):
    rows: Rows
    token: Ints
    """(token,): its number in the source"""
    layers: tuple[int, ...] | None = None
    """Places of the layers that `rows` has; None: all"""
    everyones: Ints | None = None
    """As `token`, of all ranks that share the batch; None: there is one"""

    def __len__(self) -> int:
        return len(self.token)

    @property
    def all_tokens(self) -> Ints:
        """Numbers of the whole batch's tokens, of which `token` are this rank's share."""
        return self.token if self.everyones is None else self.everyones

    def to(self, device: torch.device) -> "Batch":
        """The same with all stored numbers on the device, for values that are asked for many times.

        On a CPU it shares their memory.
        """

        def moved(part: dict[str, Any]) -> dict[str, Any]:
            return {site: torch.as_tensor(array, device=device) for site, array in part.items()}

        return Batch(Rows(*map(moved, self.rows)), *self[1:])

    def stored(self, site: str, layer_index: int) -> tuple[Tensor, Tensor]:
        """Codes (token, d_model) and scales (token, block) where they lie; bf16 bits have no scales."""
        row = layer_index if self.layers is None else self.layers.index(layer_index)
        return torch.as_tensor(self.rows.codes[site][row]), torch.as_tensor(self.rows.scales[site][row])

    def values(self, site: str, layer_index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(token, d_model) in model units; codes cross to the device before they become floats."""
        codes, scale = (part.to(device) for part in self.stored(site, layer_index))
        if codes.dtype == torch.uint16:
            return codes.view(torch.bfloat16).to(dtype)
        scale = scale.to(dtype)
        d_model = codes.shape[1]
        block = block_of(d_model, scale.shape[1])
        if d_model % block == 0:  # (token, block, channel of it) times (token, block, 1)
            blocks = codes.to(dtype).view(len(codes), -1, block)
            return blocks.mul_(scale[..., None]).view(len(codes), d_model)
        return codes.to(dtype) * scale.repeat_interleave(block, dim=1)[:, :d_model]


@dataclass
class _Buffer:
    """One filled buffer: where its tokens lie, in the order of delivery."""

    rows: Rows
    place: Ints
    token: Ints


class Reader:
    """An endless stream of the source's tokens, epoch after epoch."""

    def __init__(
        self,
        source: Source,
        *,
        buffer_tokens: int,
        seed: int,
        threads: int | None = None,
        order: str = "shuffled",
        shuffle_windows: int | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """epochs: after which nothing is wanted, and nothing is read ahead."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (world size {world_size}), found {rank}")
        self.source, self.rank, self.world_size = source, rank, world_size
        groups = None
        few = shuffle_windows is not None and shuffle_windows < len(source.window_chunks)
        if shuffle_windows is not None and few and order == "shuffled":
            groups = WindowGroups(source.window_chunks, shuffle_windows, seed)
        self.order = ReadOrder(source.n_chunks, buffer_tokens, seed, order, groups)
        self.epoch = self.buffer = self.offset = 0
        self._epochs = epochs
        self.waited = 0.0
        """Seconds that `next` waited for decoding."""
        self.tokens_read = 0
        """Tokens that count in all buffers that were filled"""
        self.threads = threads or default_threads()
        self._pool = ThreadPoolExecutor(self.threads, "clt-decode")
        self._gather = ThreadPoolExecutor(self.threads, "clt-gather")
        self._filler = ThreadPoolExecutor(1, "clt-fill")
        self._room = [source.allocate(self.order.largest_buffer) for _ in range(2)]
        self._batches = BatchMemory()
        self._current: _Buffer | None = None
        self._ahead: Future[_Buffer] | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # decoders first: what the filler waits for is cancelled, so it ends after the tasks that are running
        if self.source.stage is not None:
            self.source.stage.close()
        for pool in (self._pool, self._filler, self._gather):
            pool.shutdown(cancel_futures=True)

    def next(self, n_tokens: int) -> Batch:
        """This rank's share of the next n_tokens tokens; they may come from two buffers, and two epochs.

        Raises DamagedCacheError with file, window, layer and site where a chunk does not decode.
        """
        first, end = (n_tokens * rank // self.world_size for rank in (self.rank, self.rank + 1))
        whole = np.empty(n_tokens, np.int64)
        rows, passed = self._batches.rows(self._room[0], end - first), 0
        while passed < n_tokens:
            current = self._serve()
            stop = min(self.offset + n_tokens - passed, len(current.place))
            # a token's place in the buffer is its place in the share plus this
            shift = self.offset - passed + first
            mine = slice(max(self.offset, shift), min(stop, shift + end - first))
            if mine.stop > mine.start:
                at = mine.start - shift
                current.rows.copy(current.place[mine], rows, at, self._gather)
            whole[passed : passed + stop - self.offset] = current.token[self.offset : stop]
            passed, self.offset = passed + stop - self.offset, stop
            if self.offset == len(current.place):
                self._advance()
        return Batch(rows, whole[first:end], self.source.own, whole)

    def memory_bytes(self, batch_tokens: int) -> int:
        """At most, of this reader and its source, with batches of batch_tokens of which one is alive.

        `memory.read_memory` and the source's own (`Source.memory_bytes`).
        """
        held, manifest = self._room[0].codes["mlp_in"], self.source.manifest
        parts = read_memory(
            len(held),
            manifest.d_model,
            manifest.precision,
            buffer_tokens=len(held[0]),
            batch_tokens=-(-batch_tokens // self.world_size),
            threads=self.threads,
        )
        return sum(parts) + self.source.memory_bytes()

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for any rank of any world; what `restore` compares comes first."""
        return {**self._identity(), "epoch": self.epoch, "buffer": self.buffer, "offset": self.offset}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; the current buffer is decoded again.

        Raises ValueError where it was taken from another cache, split, selection, seed, order or buffer size,
        or stands where no reader stands.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the checkpoint was reading another {name}: {state.get(name)!r}, now {mine!r}; "
                    f"{_SAME[name]}, or begin another run"
                )
        if self._ahead is not None:
            wait([self._ahead])  # it may have failed; nothing may write into its room any more
        self._ahead = self._current = None
        most = {"epoch": 2**62, "buffer": self.order.n_buffers - 1, "offset": self.order.buffer_tokens}
        numbers = (parse_int(state.get(name), name, 0, highest) for name, highest in most.items())
        self.epoch, self.buffer, self.offset = numbers

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.source.fingerprint,
            "split": self.source.split,
            "selection": self.source.selection.to_json(),
            "seed": self.order.seed,
            "buffer_tokens": self.order.buffer_tokens,
            "order": self.order.name,
            "shuffle_windows": self.order.groups and self.order.groups.size,
        }

    def _serve(self) -> _Buffer:
        """The current buffer; starts decoding the one after it."""
        if self._current is None:
            began = time.monotonic()
            ahead = self._ahead or self._filler.submit(self._fill, self.epoch, self.buffer)
            self._current = ahead.result()
            if self.offset > len(self._current.place):
                raise ValueError(f"offset: expected at most {len(self._current.place)}, found {self.offset}")
            self.waited += time.monotonic() - began
            self._ahead = None
            if self._is_wanted(self._following()[0]):
                self._ahead = self._filler.submit(self._fill, *self._following())
        return self._current

    def _advance(self) -> None:
        self._current = None
        (self.epoch, self.buffer), self.offset = self._following(), 0

    def _is_wanted(self, epoch: int) -> bool:
        return self._epochs is None or epoch < self._epochs

    def _following(self) -> tuple[int, int]:
        last = self.buffer + 1 == self.order.n_buffers
        return (self.epoch + 1, 0) if last else (self.epoch, self.buffer + 1)

    def _fill(self, epoch: int, buffer: int) -> _Buffer:
        chunks = self.order.chunks(epoch, buffer)
        # neighbours in the stream alternate between the two rooms
        rows = self._room[(epoch * self.order.n_buffers + buffer) % len(self._room)]
        now, ahead = self.order.windows_in_use(epoch, buffer)
        last = set(now.tolist()) == set(
            self.order.windows_in_use(epoch, self.order.n_buffers - 1)[0].tolist()
        )
        self.source.stage_ahead(now, ahead if not last or self._is_wanted(epoch + 1) else ahead[:0])
        self.source.fill(rows, chunks, self._pool)
        place, token = self.source.tokens_of(chunks)
        self.tokens_read += len(place)
        shuffled = self.order.shuffled(len(place), epoch, buffer)
        return _Buffer(rows, place[shuffled], token[shuffled])


def read_in_order(source: Source, n_tokens: int) -> "list[Ints]":
    """Chunk numbers, in groups of about n_tokens tokens, for one pass in the order on disk."""
    size = max(1, n_tokens // CHUNK)
    return [np.arange(i, min(i + size, source.n_chunks)) for i in range(0, source.n_chunks, size)]
