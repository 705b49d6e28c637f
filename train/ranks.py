"""Many processes, one run: who owns which layers, and what a rank reads and sends for that; arithmetic only.

A world is a mesh of shards and replicas: rank r is shard r % shards of replica r // shards. A shard owns some
layers: their encoders, decoders (those of a target, or, tied by source, of a source), biases, skips and
optimiser state. A replica has all shards, and takes its share of every micro-batch's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .shape import Shape

NARROW = 2**15
"""Latents of a layer up to which their numbers cross in two bytes."""
TOLERATED = 1.05
"""Blocks of neighbouring layers may be this much heavier than dealt ones: they need fewer codes of others."""


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands, and who owns what."""

    owners: tuple[int, ...]
    """By layer (its place): the shard that owns it"""
    shards: int = 1
    replicas: int = 1
    rank: int = 0

    @classmethod
    def of(cls, shape: Shape, world: int, rank: int) -> "Mesh":
        """As many shards as the world can be divided into without one that owns nothing."""
        shards = max(n for n in range(1, min(world, shape.n_layers) + 1) if world % n == 0)
        return cls(deal(shape, shards), shards, world // shards, rank)

    @property
    def world(self) -> int:
        return self.shards * self.replicas

    @property
    def shard(self) -> int:
        return self.rank % self.shards

    @property
    def replica(self) -> int:
        return self.rank // self.shards

    @property
    def own(self) -> tuple[int, ...]:
        """Layers of this rank, by place, ascending."""
        return self.owned(self.shard)

    def owned(self, shard: int) -> tuple[int, ...]:
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == shard)

    def peer(self, shard: int) -> int:
        """The rank that is this shard of the same replica."""
        return self.replica * self.shards + shard

    @cached_property
    def everyone(self) -> tuple["Mesh", ...]:
        """The mesh as each rank sees it."""
        return tuple(Mesh(self.owners, self.shards, self.replicas, rank) for rank in range(self.world))

    def name(self, shape: Shape) -> str:
        """What a message calls this rank."""
        layers = ", ".join(str(shape.layers[place]) for place in self.own)
        copy = f", replica {self.replica}" if self.replicas > 1 else ""
        return f"rank {self.rank} of {self.world} (layers {layers}{copy})"


def needed(shape: Shape, layers: Sequence[int]) -> tuple[int, ...]:
    """Sources that write to these targets, ascending."""
    return tuple(sorted({source for target in layers for source in shape.sources(target)}))


def shared(shape: Shape, mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """By layer whose decoder is tied by source and used beyond its owner: the other shards that use it."""
    if shape.tie != "source":
        return {}
    users = {
        layer: tuple(sorted({mesh.owners[t] for t in shape.targets(layer)} - {owner}))
        for layer, owner in enumerate(mesh.owners)
    }
    return {layer: others for layer, others in users.items() if others}


def deal(shape: Shape, shards: int) -> tuple[int, ...]:
    """The shard of each layer: as many layers to each, give or take one, and about as many decoders.

    Layers are dealt out in turn, from those with the most sources to those with the fewest, there and back.
    Blocks of neighbours are taken instead where they are as balanced, for they need fewer codes of others.
    """
    n = shape.n_layers
    by_weight = sorted(range(n), key=lambda layer: (-len(shape.sources(layer)), -layer))
    turns = [*range(shards), *reversed(range(shards))]
    dealt = {layer: turns[nth % len(turns)] for nth, layer in enumerate(by_weight)}
    options = [tuple(layer * shards // n for layer in range(n)), tuple(dealt[layer] for layer in range(n))]
    blocks, mixed = (max(_decoders(shape, owners, shards)) for owners in options)
    return options[0] if blocks <= TOLERATED * mixed else options[1]


def _decoders(shape: Shape, owners: tuple[int, ...], shards: int) -> list[int]:
    """Products a token by shard: one for the encoder of each layer, one for each decoder that is used."""
    counts = [0] * shards
    for layer, owner in enumerate(owners):
        counts[owner] += 1 + len(shape.sources(layer))
    return counts


def parameters(shape: Shape, layers: Sequence[int]) -> int:
    """Of the layers that one shard owns."""
    size, jumps = shape.n_latents * shape.d_model, shape.activation == "jumprelu"
    total = 0
    for layer in layers:
        decoder = (len(shape.sources(layer)) if shape.tie == "none" else 1) * size
        total += size + (1 + jumps) * shape.n_latents + decoder + shape.d_model
        total += shape.d_model**2 if shape.skip else 0
    return total


def imbalance(shape: Shape, mesh: Mesh) -> float:
    """Parameters of the heaviest shard over those of a mean one."""
    each = [parameters(shape, mesh.owned(shard)) for shard in range(mesh.shards)]
    return max(each) * mesh.shards / sum(each)


class WireBytes(NamedTuple):
    """What one rank sends to others in one optimiser step."""

    codes: float
    """Values and numbers of the active latents of its sources, to every shard that uses them"""
    code_grads: float
    """Gradients of others' codes, back to their owners"""
    sums: float
    """How often each latent was positive, summed over all ranks, and what else is: little"""
    shared_decoders: float = 0.0
    """Tied by source only: gradients to the owner, and its new weights to the users"""
    replicas: float = 0.0
    """Sums of the gradients over replicas"""

    @property
    def total(self) -> float:
        return sum(self)


def ring_bytes(nbytes: int, ranks: int) -> float:
    """What each of `ranks` sends while they add up `nbytes` in a ring."""
    return 2 * nbytes * (ranks - 1) / ranks


def wire_bytes(shape: Shape, mesh: Mesh, step_tokens: int, *, work: int = 4, weight: int = 4) -> WireBytes:
    """Of `mesh.rank`; step_tokens: of all replicas. work, weight: bytes of a value, and of one of a matrix.

    For topk and groupmax, whose number of codes is known beforehand; losses beside FVU are not counted.
    """
    if not shape.layer_k:
        raise ValueError(f"{shape.activation} has no k, so that what its codes weigh is not known beforehand")
    tokens = step_tokens / mesh.replicas
    index = 2 if shape.n_latents <= NARROW else 4
    codes = grads = 0.0
    for shard in range(mesh.shards):
        if shard != mesh.shard:
            k_there = sum(shape.layer_k[s] for s in needed(shape, mesh.owned(shard)) if s in mesh.own)
            k_here = sum(shape.layer_k[s] for s in needed(shape, mesh.own) if mesh.owners[s] == shard)
            codes += tokens * k_there * (work + index)
            grads += tokens * k_here * work
    users = shared(shape, mesh)
    size = shape.n_latents * shape.d_model
    tied = weight * size * sum(len(others) for layer, others in users.items() if layer in mesh.own)
    tied += work * size * sum(mesh.shard in others for others in users.values())
    counted = ring_bytes(4 * shape.n_layers * shape.n_latents, mesh.world)
    summed = ring_bytes(parameters(shape, mesh.own) * work, mesh.replicas)
    return WireBytes(codes, grads, counted, tied, summed)
