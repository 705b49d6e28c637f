"""LLaVA-1.5-7B on five sets of devices, a step of 32,768 tokens: the tables of docs/scaling.md.

python -m clt.planning.scaling
"""

from typing import NamedTuple

from ..train.memory import llava_shape
from ..train.ranks import Mesh, wire_bytes
from .cache_size import CacheSize, layer_bytes
from .rank_cost import Machine, StepTime, Work, rank_memory, slowest

ACHIEVED = 0.5
"""Of the rates that makers state; an assumption."""
CORES, DECODE_OF_CORE = 8, 0.75e9
"""Cores for each device, and values a second that one decodes: 1.5 GB/s of bf16, half of what is measured on
a core that does nothing else (benchmarks/bench_read.py)."""
CACHE = CacheSize(n_layers=32, d_model=4096)


class Box(NamedTuple):
    name: str
    world: int
    machine: Machine
    work: Work


def _machine(
    memory: float, bandwidth: float, tflops: float, host: float, wire: float, disk: float
) -> Machine:
    """GB, GB/s, TFLOP/s, GB/s each."""
    return Machine(
        memory * 1e9,
        ACHIEVED * bandwidth * 1e9,
        ACHIEVED * tflops * 1e12,
        ACHIEVED * host * 1e9,
        ACHIEVED * wire * 1e9,
        disk * 1e9,
        CORES * DECODE_OF_CORE,
    )


def boxes() -> list[Box]:
    """24 GB: 1,008 GB/s, 165 TFLOP/s, PCIe 4. 80 GB: 3,350 GB/s, 989 TFLOP/s, PCIe 5, NVLink within a
    machine of 8, 400 Gbit/s between machines. A local NVMe of 6 GB/s a machine, shared by its ranks."""
    shape = llava_shape()
    work, away = Work(shape), Work(shape, offload="host")
    return [
        Box("1x24 GB, `--offload host`", 1, _machine(24, 1008, 165, 32, 32, 6), away),
        Box("4x24 GB", 4, _machine(24, 1008, 165, 32, 32, 6 / 4), work),
        Box("1x80 GB", 1, _machine(80, 3350, 989, 64, 64, 6), work),
        Box("8x80 GB", 8, _machine(80, 3350, 989, 64, 450, 6 / 8), work),
        Box("64x80 GB", 64, _machine(80, 3350, 989, 64, 50, 6 / 8), work),
    ]


def memory_table() -> str:
    """Bytes of the heaviest rank, as Markdown."""
    lines = ["| devices | shards x replicas | device, GB | of | host, GB | read, kB a token and rank |"]
    lines.append("|---|---|---|---|---|---|")
    for box in boxes():
        meshes = Mesh.of(box.work.shape, box.world, 0).everyone
        held = max((rank_memory(box.work, mesh) for mesh in meshes), key=lambda memory: memory.step.device)
        most = max(len(mesh.own) for mesh in meshes)
        read = most * layer_bytes(CACHE, CACHE.window) / CACHE.window
        lines.append(
            f"| {box.name} | {meshes[0].shards} x {meshes[0].replicas} | {held.step.device / 1e9:.1f} | "
            f"{box.machine.memory / 1e9:.0f} | {held.host / 1e9:.1f} | {read / 1e3:.1f} |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    """Milliseconds of a step of the slowest rank, and tokens a second of all, as Markdown."""
    names = ["devices", "wire, kB a token and rank", *StepTime._fields, "**tokens/s**"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for box in boxes():
        meshes = Mesh.of(box.work.shape, box.world, 0).everyone
        tokens = box.work.step_tokens
        sent = max(wire_bytes(box.work.shape, mesh, tokens, weight=2).total for mesh in meshes) / tokens
        time = slowest(box.work, box.world, box.machine, CACHE)
        parts = " | ".join(f"{1e3 * seconds:.0f}" for seconds in time)
        speed = tokens / time.total(box.work.hidden)
        lines.append(f"| {box.name} | {sent / 1e3:.1f} | {parts} | **{speed:.0f}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table(), speed_table(), sep="\n\n")
