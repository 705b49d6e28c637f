"""What ranks of one run tell each other: codes and their gradients, and sums. Never activations.

`Exchange` is the form for one process, where everything is here already; `RankExchange` goes over
torch.distributed, with gloo for CPU tensors and NCCL for CUDA's. Both ends know from the mesh what comes in
which order, so that nothing but numbers crosses. All sums are taken in the same order by all.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..stopping import StopRequested
from .ranks import NARROW, Mesh, WireBytes, needed, ring_bytes, shared
from .shape import Shape
from .sparse import Codes


class LostTouch(Exception):
    """Another rank did not answer."""


class Exchange:
    """Of one process: nothing is exchanged."""

    first = True
    """Whether this rank speaks for all: it prints, and writes what is not of one layer."""
    mesh: Mesh | None = None
    shared: dict[int, tuple[int, ...]] = {}  # noqa: RUF012 - never changed
    """By layer whose decoder others use too: their shards"""
    sent: dict[str, float] = {}  # noqa: RUF012 - never changed
    """Bytes sent to others so far, by field of `WireBytes`"""
    world = 1
    """Ranks in all"""
    replica = 0
    replicas = 1
    """Ranks that have the same layers"""
    seconds = 0.0
    """Spent in exchanges so far, waiting for the others included"""

    def codes(self, codes: Sequence[dict[int, Codes]], tokens: Sequence[int]) -> None:
        """Add to each micro-batch's own codes, by source, those of others that its targets need."""

    def code_grads(self, codes: Sequence[dict[int, Codes]], grads: Sequence[dict[int, Tensor]]) -> None:
        """Add others' gradients (code,) of own codes to their own; each dict as `codes` had it."""

    def send(self, tensor: Tensor, shard: int) -> None:
        """To the same replica's rank of that shard."""

    def received(self, like: Tensor, shard: int) -> Tensor:
        """What it sends; of the shape and dtype of `like`."""
        raise NotImplementedError("one process has no others")

    def owner(self, layer: int) -> int:
        """The layer's shard."""
        return 0

    def sum_shards(self, tensor: Tensor) -> Tensor:
        """Over the shards of a replica, in place."""
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Over all replicas of a shard, in place."""
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        return tensor

    def pool(self, values: Tensor) -> Tensor:
        """Values (n,) of all replicas, one after the other; n may differ."""
        return values

    def agree(self, answer: bool) -> bool:
        """What the first rank answers; no rank goes on before all have asked."""
        return answer

    def anyone(self, answer: bool) -> bool:
        """Whether any rank says yes; no rank goes on before all have asked."""
        return answer

    def check_stop(self) -> None:
        """StopRequested on every rank where any was asked to stop."""
        StopRequested.check()


ALONE = Exchange()


class RankExchange(Exchange):
    """Of one rank of many."""

    def __init__(self, shape: Shape, mesh: Mesh) -> None:
        self.mesh, self.first, self.shared = mesh, mesh.rank == 0, shared(shape, mesh)
        self.shape, self.world, self.seconds = shape, mesh.world, 0.0
        self.replica, self.replicas = mesh.replica, mesh.replicas
        self.sent = dict.fromkeys(WireBytes._fields, 0.0)
        ranks = torch.arange(mesh.world).view(mesh.replicas, mesh.shards)
        # every rank makes every group, in the same order
        rows = [dist.new_group(row) for row in ranks.tolist()]
        columns = [dist.new_group(column) for column in ranks.T.tolist()]
        self._shards, self._replicas = rows[mesh.replica], columns[mesh.shard]
        others = [shard for shard in range(mesh.shards) if shard != mesh.shard]
        wanted = {shard: needed(shape, mesh.owned(shard)) for shard in range(mesh.shards)}
        self._to = {shard: [s for s in mesh.own if s in wanted[shard]] for shard in others}
        self._from = {shard: [s for s in wanted[mesh.shard] if mesh.owners[s] == shard] for shard in others}

    def codes(self, codes: Sequence[dict[int, Codes]], tokens: Sequence[int]) -> None:
        lengths, widths = self._sizes(codes)
        example = next(iter(codes[0].values()))
        narrow = torch.int16 if self.shape.n_latents <= NARROW else torch.int32
        outgoing = {shard: [part[s] for part in codes for s in own] for shard, own in self._to.items()}
        numbers = range(len(codes))
        incoming = {shard: [(n, s) for n in numbers for s in its] for shard, its in self._from.items()}
        sizes = {shard: [int(lengths[place]) for place in places] for shard, places in incoming.items()}
        out = {shard: [each.values for each in its] for shard, its in outgoing.items()}
        values = self._swap("codes", out, sizes, example.values)
        out = {shard: [each.columns.to(narrow) for each in its] for shard, its in outgoing.items()}
        columns = self._swap("codes", out, sizes, example.columns.to(narrow))
        starts = self._starts(outgoing, incoming, widths, tokens, example.starts)
        for shard, places in incoming.items():
            for place, *found in zip(places, starts[shard], columns[shard], values[shard], strict=True):
                codes[place[0]][place[1]] = Codes(found[0], found[1].int(), found[2], self.shape.n_latents)

    def _sizes(self, codes: Sequence[dict[int, Codes]]) -> tuple[Tensor, Tensor]:
        """(micro-batch, source): how many codes of all tokens, and of each, -1 where tokens differ in it."""
        sizes = torch.zeros(2, len(codes), self.shape.n_layers, dtype=torch.int64)
        for number, part in enumerate(codes):
            for source, own in part.items():
                sizes[0, number, source] = len(own.values)
                sizes[1, number, source] = -1 if own.width is None else own.width
        lengths, widths = self.sum_shards(sizes)
        return lengths, widths

    def _starts(
        self,
        outgoing: dict[int, list[Codes]],
        incoming: dict[int, list[tuple[int, int]]],
        widths: Tensor,
        tokens: Sequence[int],
        like: Tensor,
    ) -> dict[int, list[Tensor]]:
        """Where each token's codes begin: from their number where it is the same for all, else it crosses."""
        counts: dict[int, list[Tensor]] = {shard: [] for shard in incoming}
        if bool((widths < 0).any()):
            out = {d: [c.starts.diff() for c in its if c.width is None] for d, its in outgoing.items()}
            sizes = {d: [tokens[p[0]] for p in its if widths[p] < 0] for d, its in incoming.items()}
            counts = self._swap("codes", out, sizes, like)
        starts: dict[int, list[Tensor]] = {}
        for shard, places in incoming.items():
            crossed = iter(counts[shard])
            starts[shard] = []
            for place in places:
                begins = torch.arange(tokens[place[0]] + 1, dtype=torch.int32, device=like.device)
                if widths[place] < 0:
                    begins[0] = 0
                    begins[1:] = next(crossed).cumsum(0)
                else:
                    begins *= int(widths[place])
                starts[shard].append(begins)
        return starts

    def code_grads(self, codes: Sequence[dict[int, Codes]], grads: Sequence[dict[int, Tensor]]) -> None:
        own = {shard: [(n, s) for n in range(len(codes)) for s in its] for shard, its in self._to.items()}
        found = self._swap(
            "code_grads",
            {shard: [part[s] for part in grads for s in its] for shard, its in self._from.items()},
            {shard: [len(codes[n][s].values) for n, s in places] for shard, places in own.items()},
            next(iter(codes[0].values())).values,
        )
        for shard, places in own.items():
            for (number, source), grad in zip(places, found[shard], strict=True):
                grads[number][source] += grad

    def send(self, tensor: Tensor, shard: int) -> None:
        assert self.mesh is not None
        with self._meeting("shared_decoders", _bytes(tensor)):
            dist.send(tensor.contiguous(), self.mesh.peer(shard), self._shards)

    def received(self, like: Tensor, shard: int) -> Tensor:
        assert self.mesh is not None
        found = torch.empty_like(like)
        with self._meeting("shared_decoders", 0):
            dist.recv(found, self.mesh.peer(shard), self._shards)
        return found

    def owner(self, layer: int) -> int:
        assert self.mesh is not None
        return self.mesh.owners[layer]

    def sum_shards(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor, "sums", self._shards)

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor, "replicas", self._replicas)

    def total(self, tensor: Tensor) -> Tensor:
        return self._sum(tensor, "sums", None)

    def _sum(self, tensor: Tensor, purpose: str, group: dist.ProcessGroup | None) -> Tensor:
        ranks = dist.get_world_size(group)
        if ranks > 1:
            with self._meeting(purpose, ring_bytes(_bytes(tensor), ranks)):
                dist.all_reduce(tensor, group=group)
        return tensor

    def pool(self, values: Tensor) -> Tensor:
        ranks = dist.get_world_size(self._replicas)
        if ranks == 1:
            return values
        lengths = torch.zeros(ranks, dtype=torch.int64)
        lengths[dist.get_rank(self._replicas)] = len(values)
        self.sum_replicas(lengths)
        padded = values.new_zeros(int(lengths.max()))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        with self._meeting("replicas", _bytes(padded) * (ranks - 1)):
            dist.all_gather(parts, padded, group=self._replicas)
        return torch.cat([part[:n] for part, n in zip(parts, lengths.tolist(), strict=True)])

    def agree(self, answer: bool) -> bool:
        return bool(self.total(torch.tensor(int(answer and self.first))))

    def anyone(self, answer: bool) -> bool:
        return bool(self.total(torch.tensor(int(answer))))

    def check_stop(self) -> None:
        if self.anyone(StopRequested.requested):
            raise StopRequested

    def _swap(
        self, purpose: str, outgoing: dict[int, list[Tensor]], sizes: dict[int, list[int]], like: Tensor
    ) -> dict[int, list[Tensor]]:
        """By shard, tensors (n,) of one dtype to it, and those that come from it, of these sizes."""
        assert self.mesh is not None
        shards = range(self.mesh.shards)
        width = like.element_size()
        there = [sum(map(_bytes, outgoing.get(shard, []))) for shard in shards]
        here = [sum(sizes.get(shard, [])) * width for shard in shards]
        tensors = [tensor for shard in shards for tensor in outgoing.get(shard, [])]
        message = torch.cat(tensors) if tensors else like.new_empty(0)
        answer = like.new_empty(sum(here) // width)
        with self._meeting(purpose, sum(there)):
            dist.all_to_all_single(
                answer.view(torch.uint8), message.view(torch.uint8), here, there, group=self._shards
            )
        parts = iter(answer.split([size for shard in shards for size in sizes.get(shard, [])]))
        return {shard: [next(parts) for _ in sizes[shard]] for shard in shards if shard in sizes}

    @contextmanager
    def _meeting(self, purpose: str, nbytes: float) -> Iterator[None]:
        """Within, ranks wait for each other; counts what is sent and how long it takes."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as fault:
            raise LostTouch(str(fault)) from fault
        self.sent[purpose] += nbytes
        self.seconds += time.monotonic() - began


def sum_in_order(exchange: Exchange, grads: Iterable[Tensor]) -> None:
    """Over replicas, one after the other."""
    for grad in grads:
        exchange.sum_replicas(grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
