"""What `clt plan` says of training: parameters, memory by optimiser and placement, bytes between ranks."""

from ..train.config import OPTIMIZERS, WITH_K
from ..train.held_out_memory import HeldOutMemory, held_out_memory
from ..train.memory import BYTES
from ..train.ranks import Mesh, wire_bytes
from .line import Line, count_text, parts_text, size_text
from .plan_config import PlanConfig, work_of
from .rank_cost import RankMemory, Work, rank_memory

PROCESS_BYTES = 280 * 2**20
"""Python with torch and what `clt train` imports, 230 MiB with the CPU build of torch 2.13, and what its
libraries take in the first step."""


def training_lines(config: PlanConfig) -> list[Line]:
    shape = config.shape
    decoders = shape.n_decoders * shape.n_latents * shape.d_model
    lines = [
        Line(
            "training",
            "parameters",
            shape.n_parameters,
            f"{count_text(shape.n_parameters)} parameters, {count_text(decoders)} in "
            f"{shape.n_decoders} decoders",
            f"({shape.n_layers} encoders + {shape.n_decoders} decoders) * {shape.n_latents} latents * "
            f"{shape.d_model} channels, and biases; {shape.n_pairs} (source, target) pairs",
        )
    ]
    meshes = Mesh.of(shape, config.ranks, 0).everyone
    for optimizer in (config.optimizer,) if config.optimizer else OPTIMIZERS:
        if optimizer == "adam8" and config.dtype == "float64":
            continue
        for offload in ("none", "host") if config.ranks == 1 else ("none",):
            work = work_of(config, optimizer, offload)
            ranks = [rank_memory(work, mesh) for mesh in meshes]
            lines.append(_memory_line(config, work, max(ranks, key=lambda memory: memory.step.device)))
    if config.ranks > 1:
        lines.append(_wire_line(config, meshes))
    return lines


def _memory_line(config: PlanConfig, work: Work, held: RankMemory) -> Line:
    """Decoders on the device, or away from it; at the peak of a step or of the held-out numbers."""
    step, away, reading = held
    measured = _held_out(config, work)
    in_step, in_measuring = step.device, step.parameters + step.optimizer + measured.codes + measured.values
    device = max(in_step, in_measuring)
    buffers = PROCESS_BYTES + away + sum(reading)
    host = buffers + max(step.batches, measured.rows)
    together = buffers + max(in_step + step.batches, in_measuring + measured.rows)
    on_device = parts_text({name: part for name, part in step._asdict().items() if name != "batches"})
    decoders = f"decoders and their state {size_text(away)} (with disk: there) + " if away else ""
    of_rank = f"; the heaviest of {config.ranks} ranks" if config.ranks > 1 else ""
    return Line(
        "training",
        f"memory_{work.optimizer}{'_offload' if away else ''}",
        {"device": device, "host": host, "one_machine": together},
        f"{'  --offload host: ' if away else f'{work.optimizer:<7} '}device {size_text(device)}, host "
        f"{size_text(host)}; {size_text(together)} where both are one{of_rank}",
        f"device: {on_device}{_assumed(config)}; host: {decoders}batches {size_text(step.batches)} + "
        f"{parts_text(reading._asdict())} + Python and torch {size_text(PROCESS_BYTES)}; held-out numbers "
        f"take, in place of gradients, codes, values and batches, {parts_text(measured._asdict())}, and the "
        f"larger counts; train/memory.py and train/held_out_memory.py, {config.dtype}",
    )


def _held_out(config: PlanConfig, work: Work) -> HeldOutMemory:
    """Of the rank that reads most layers."""
    whole = held_out_memory(work.shape, work.shape.n_layers, work.precision, work.dtype)
    most = max(len(mesh.own) for mesh in Mesh.of(work.shape, config.ranks, 0).everyone)
    return whole._replace(rows=whole.rows * most // work.shape.n_layers)


def _assumed(config: PlanConfig) -> str:
    if config.transcoder.activation in WITH_K:
        return ""
    whose = "--l0" if config.l0 else "all, an upper bound; --l0 assumes fewer"
    return f"; codes for {config.shape.k} active latents a layer ({whose})"


def _wire_line(config: PlanConfig, meshes: tuple[Mesh, ...]) -> Line:
    tokens = config.batch_tokens * config.grad_acc_steps
    sent = [wire_bytes(config.shape, m, tokens, weight=BYTES[config.dtype]) for m in meshes]
    most = max(sent, key=lambda wire: wire.total)
    parts = parts_text({name: round(size / tokens) for name, size in most._asdict().items()})
    return Line(
        "training",
        "wire_bytes_per_token",
        most.total / tokens,
        f"{size_text(most.total / tokens)} a token sent by the rank that sends most "
        f"({meshes[0].shards} shards, {meshes[0].replicas} replicas)",
        f"train/ranks.py, wire_bytes: {parts}",
    )
