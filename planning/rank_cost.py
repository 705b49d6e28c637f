"""What one rank holds, reads, sends and computes in a step: sizes from train/, times from rates.

Rates are a machine's, stated by whoever asks; nothing here was measured on a GPU.
"""

from typing import NamedTuple

from ..cache_format.layout import vector_bytes
from ..train.memory import (
    BYTES,
    ReadMemory,
    StepMemory,
    offload_memory,
    read_memory,
    state_bytes,
    step_memory,
)
from ..train.ranks import Mesh, needed, parameters, wire_bytes
from ..train.shape import Shape
from .cache_size import CacheSize, layer_bytes

PASSES = (2, 8)
"""How often a layer's pre-activations, and its values, are written or read: pre-activations once each; values
of both sites as they are made, those of mlp_in for two products, the error as it is made and for two."""


class Work(NamedTuple):
    """What is trained and how."""

    shape: Shape
    batch_tokens: int = 4096
    """Of a micro-batch, of all replicas"""
    grad_acc_steps: int = 8
    dtype: str = "bfloat16"
    optimizer: str = "adam8"
    offload: str = "none"
    buffer_tokens: int = 32_768
    precision: str = "int8"
    threads: int = 16

    @property
    def hidden(self) -> float:
        """Share of a step's reading that goes on while the device works: one buffer is read ahead."""
        return min(1.0, self.buffer_tokens / self.step_tokens)

    @property
    def step_tokens(self) -> int:
        return self.batch_tokens * self.grad_acc_steps

    @property
    def moment(self) -> float:
        """Bytes of optimiser state for each weight."""
        return state_bytes(self.optimizer, max(BYTES[self.dtype], 4))


class Machine(NamedTuple):
    """What one rank has; bytes and operations a second."""

    memory: float
    """Bytes of the device"""
    bandwidth: float
    flops: float
    """Of dense products"""
    host_link: float
    """Each way, between the device and host memory"""
    wire: float
    """Sent by one rank to the others"""
    disk: float
    """Of the cache, a rank's share"""
    decode: float
    """Values of the cache made from its bytes, by all cores of a rank"""


class RankMemory(NamedTuple):
    """Bytes of one rank."""

    step: StepMemory
    """Of its own share; parameters and optimizer: what is on the device"""
    away: int
    """Decoders and their state in host memory, or on the disk"""
    reading: ReadMemory

    @property
    def host(self) -> int:
        """Beside the device, Python and torch aside."""
        return self.away + self.step.batches + sum(self.reading)


class StepTime(NamedTuple):
    """Seconds of a step of the slowest rank, by what takes them."""

    read: float
    decode: float
    encode: float
    """Dense products of the encoders, and what passes over dense values: see `PASSES`"""
    sparse: float
    """Rows of decoders and encoders that active latents read and write"""
    update: float
    """Weights, state and gradients through the optimiser"""
    move: float
    """Decoders to the device and back; both ways at a time"""
    wire: float

    @property
    def device(self) -> float:
        """What the device does one after another."""
        return self.encode + self.sparse + self.update + self.wire

    def total(self, hidden: float = 1.0) -> float:
        """Moving goes on beside the device, and so does reading as far as it is `hidden`: the rest of it is
        waited for."""
        reading = max(self.read, self.decode)
        return (1 - hidden) * reading + max(hidden * reading, self.device, self.move)


def rank_memory(work: Work, mesh: Mesh) -> RankMemory:
    """Of mesh.rank: `step_memory`, with its own share of weights, state, codes and batches."""
    shape, own = work.shape, mesh.own
    tokens = -(-work.batch_tokens // mesh.replicas)
    buffers = read_memory(
        len(own),
        shape.d_model,
        work.precision,
        buffer_tokens=work.buffer_tokens,
        batch_tokens=0,  # the step's batches are counted by the step
        threads=work.threads,
    )
    stored = vector_bytes(shape.d_model, work.precision == "int8") / shape.d_model
    sizes = {"tokens": tokens, "grad_acc_steps": work.grad_acc_steps, "dtype": work.dtype}
    sizes |= {"optimizer": work.optimizer, "stored_bytes": stored}
    if work.offload != "none":
        assert mesh.shards == 1
        away = offload_memory(shape, **sizes)  # type: ignore[arg-type]
        return RankMemory(away.step, away.away, buffers)
    step = step_memory(shape, **sizes)  # type: ignore[arg-type]
    mine = parameters(shape, own)
    codes = sum(shape.layer_k[source] for source in needed(shape, own)) / sum(shape.layer_k)
    largest = max(len(shape.sources(layer)) for layer in own) if shape.tie == "none" else 1
    of_all = max(len(shape.sources(layer)) for layer in range(shape.n_layers)) if shape.tie == "none" else 1
    held = step._replace(
        parameters=mine * BYTES[work.dtype],
        optimizer=int(mine * work.moment),
        gradients=step.gradients * largest // of_all,
        codes=int(step.codes * codes),
        batches=step.batches * len(own) // shape.n_layers,
    )
    return RankMemory(held, 0, buffers)


def step_time(work: Work, mesh: Mesh, machine: Machine, cache: CacheSize) -> StepTime:
    """Of mesh.rank, one step of work.step_tokens tokens."""
    shape, own = work.shape, mesh.own
    tokens = work.step_tokens / mesh.replicas
    matrix, size = shape.n_latents * shape.d_model, BYTES[work.dtype]
    rows = sum(3 * shape.layer_k[s] for t in own for s in shape.sources(t))
    rows += sum(2 * shape.layer_k[s] for s in own)  # an encoder's gradient: read and write
    passed = PASSES[0] * shape.n_latents + PASSES[1] * shape.d_model
    weights = parameters(shape, own)
    away = weights - len(own) * matrix if work.offload != "none" else 0
    # every rank of a replica decodes the buffers of the whole replica, of its own layers
    stored = layer_bytes(cache, work.step_tokens) * len(own)
    moved = away * (size + work.moment)
    return StepTime(
        read=stored / machine.disk,
        decode=work.step_tokens * len(own) * 2 * shape.d_model / machine.decode,
        encode=2 * matrix * len(own) * tokens / machine.flops
        + passed * len(own) * tokens * max(size, 4) / machine.bandwidth,
        sparse=rows * shape.d_model * size * tokens / machine.bandwidth,
        update=weights * 2 * (size + work.moment + 4) / machine.bandwidth,
        move=moved / machine.host_link,
        wire=wire_bytes(shape, mesh, work.step_tokens, weight=size).total / machine.wire,
    )


def slowest(work: Work, world: int, machine: Machine, cache: CacheSize) -> StepTime:
    """Of the rank that the others wait for."""
    ranks = Mesh.of(work.shape, world, 0).everyone
    times = [step_time(work, mesh, machine, cache) for mesh in ranks]
    # in whole microseconds: where all wait for the same reading, the one that has most to do
    return max(times, key=lambda time: (round(1e6 * time.total(work.hidden)), sum(time)))
