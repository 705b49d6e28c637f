"""How much memory a run needs, by part: a formula of sizes. benchmarks/bench_step.py measures beside it.

python -m clt.train.memory     # the tables of docs/memory.md
"""

from typing import NamedTuple

from ..cache_format.layout import CHUNK, SITES, vector_bytes
from .shape import Shape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
ADAM8_BLOCK_STATE = 8 / 256
"""Bytes a value, beside its two codes: two float32 absmax for each 256 values."""
SLAB = 1 << 20
"""Values of a weight that are updated together on a CPU."""
SCREENED = 1 << 22
"""Values of an encoder from which on a CPU screens its codes in bfloat16; below, that costs what it saves."""
MERGING_BYTES = 8 + 8 + 8
"""For each code that is merged with those of other sources: where it goes, and the order that is sorted."""
CODE_INDEX_BYTES = 4 + 4 + 4
"""Of each code: its latent; and in the transpose its token and its place among the codes."""

ORDER_BYTES = 64
"""For each token of a buffer: its place and number, and what it takes to permute them."""
THREAD_BYTES = 1 << 20
"""For each decoding thread: the decoder's tables, and its stack as far as it is used."""


class StepMemory(NamedTuple):
    """Bytes that are held at the peak of a step."""

    parameters: int
    optimizer: int
    gradients: int
    """One target's decoders; each encoder uses the same room afterwards."""
    codes: int
    """Of all sources and micro-batches, by token and by latent, and their gradients."""
    values: int
    """One layer's dense values at a time: pre-activations, or a target's error beside its true values, or
    beside what the optimiser needs for a piece of a weight; of a bfloat16 matrix a float32 copy."""
    batches: int
    """Stored numbers of the micro-batches; in host memory where the device is another."""

    @property
    def device(self) -> int:
        """All but the batches, which cross to the device a layer at a time."""
        return sum(self) - self.batches

    @property
    def total(self) -> int:
        return sum(self)


def step_memory(
    shape: Shape,
    *,
    tokens: int,
    grad_acc_steps: int = 1,
    dtype: str = "float32",
    optimizer: str = "adam",
    stored_bytes: float = 1.0,
) -> StepMemory:
    """Bytes of one process; tokens: of a micro-batch; stored_bytes: a value in the cache, 1 int8, 2 bf16."""
    size = BYTES[dtype]
    work = max(size, 4)  # sums and moments are float32 at least
    if not shape.layer_k:
        raise ValueError(
            f"{shape.activation} has no k, so that the number of its codes is not known beforehand"
        )
    n_codes = sum(shape.layer_k) * tokens * grad_acc_steps
    dense = tokens * max(shape.d_model + shape.n_latents, 2 * shape.d_model + shape.d_model // 2)
    if size < work:  # a weight in bfloat16 is made float32 for as long as it is used
        dense += shape.n_latents * shape.d_model
    elif shape.activation == "topk" and shape.n_latents * shape.d_model >= SCREENED:
        dense = max(dense, _screening_values(shape, tokens))
    largest = largest_decoders(shape) * shape.n_latents * shape.d_model + shape.skip * shape.d_model**2
    return StepMemory(
        parameters=shape.n_parameters * size,
        optimizer=int(shape.n_parameters * state_bytes(optimizer, work)),
        gradients=held_layers(shape) * largest * work,
        codes=n_codes * (CODE_INDEX_BYTES + 3 * work) + _merged_bytes(shape, tokens, work),
        values=max(dense, tokens * shape.d_model + _updated_values(optimizer, shape, size)) * work,
        batches=int(2 * shape.n_layers * shape.d_model * tokens * grad_acc_steps * stored_bytes),
    )


def _screening_values(shape: Shape, tokens: int) -> int:
    """With inputs, their halves, half pre-activations, and latents that are near; and half an encoder."""
    each = shape.d_model + shape.d_model // 2 + shape.n_latents // 2 + shape.n_latents // 16
    return tokens * each + shape.n_latents * shape.d_model // 2


def _merged_bytes(shape: Shape, tokens: int, work: int) -> int:
    """Of the codes of all sources of one target as one matrix, beside those of each source."""
    if shape.tie != "target":
        return 0
    most = max(sum(shape.layer_k[s] for s in shape.sources(t)) for t in range(shape.n_layers))
    return most * tokens * (CODE_INDEX_BYTES + 2 * work + MERGING_BYTES)


def _updated_values(optimizer: str, shape: Shape, size: int) -> int:
    """What the optimiser takes beside weight, gradient and state while it changes a piece of a weight."""
    rounding = 3 * SLAB if size < 4 else 0  # the piece in float32, and random bits
    if optimizer != "muon":
        return rounding
    return 3 * shape.n_latents * shape.d_model + 2 * min(shape.n_latents, shape.d_model) ** 2 + rounding


class OffloadMemory(NamedTuple):
    """Bytes with `--offload host` or `disk`."""

    step: StepMemory
    """Its parameters and optimizer: what stays on the device, and the room through which layers pass."""
    away: int
    """Decoders, skips and their state, in host memory or on the disk"""

    @property
    def moved(self) -> int:
        """That cross to the device in a step, however many tokens it has; as many come back."""
        return self.away


def offload_memory(
    shape: Shape,
    *,
    tokens: int,
    grad_acc_steps: int = 1,
    dtype: str = "float32",
    optimizer: str = "adam",
    stored_bytes: float = 1.0,
) -> OffloadMemory:
    """Arguments as of `step_memory`. There is room for the layers whose gradients are held, and for one more.

    Losses of sparsity and of dead latents read all decoders once more in a step.
    """
    step = step_memory(
        shape,
        tokens=tokens,
        grad_acc_steps=grad_acc_steps,
        dtype=dtype,
        optimizer=optimizer,
        stored_bytes=stored_bytes,
    )
    size = BYTES[dtype]
    state = state_bytes(optimizer, max(size, 4))
    skip = shape.d_model**2 if shape.skip else 0
    away = shape.n_decoders * shape.n_latents * shape.d_model + shape.n_layers * skip
    largest = largest_decoders(shape) * shape.n_latents * shape.d_model + skip
    rooms = min(held_layers(shape) + 1, shape.n_layers)
    on_device = shape.n_parameters - away + rooms * largest
    passing = step._replace(parameters=on_device * size, optimizer=int(on_device * state))
    return OffloadMemory(passing, int(away * (size + state)))


def largest_decoders(shape: Shape) -> int:
    """Of one layer."""
    return len(shape.sources(shape.n_layers - 1)) if shape.tie == "none" else 1


def held_layers(shape: Shape) -> int:
    """Whose decoders' gradients are held at a time."""
    return min(shape.n_targets, shape.n_layers) if shape.tie == "source" else 1


class ReadMemory(NamedTuple):
    """Bytes of host memory that reading holds at most, the token columns and journals of its caches aside.

    Pages of mapped files are not counted: the system takes them back at need.
    """

    buffers: int
    """Two: one is served while the other is decoded."""
    batch: int
    decoding: int
    """In each thread the chunk that it reads, and room to decode it."""


def read_memory(
    n_layers: int, d_model: int, precision: str, *, buffer_tokens: int, batch_tokens: int, threads: int
) -> ReadMemory:
    """n_layers: that are read; buffer_tokens: rounded to whole chunks; batch_tokens: of one rank's share."""
    token = len(SITES) * n_layers * vector_bytes(d_model, precision == "int8")
    chunk = CHUNK * d_model * (1 if precision == "int8" else 2)
    return ReadMemory(
        2 * buffer_tokens * (token + ORDER_BYTES),
        batch_tokens * (token + 8),
        threads * (4 * chunk + THREAD_BYTES),
    )


def state_bytes(optimizer: str, work: int) -> float:
    """Optimiser state of one value; work: bytes of a moment. Vectors, which are few, count like matrices."""
    return {"adam": 2 * work, "adam8": 2 + ADAM8_BLOCK_STATE, "signum": work, "muon": work}[optimizer]


def llava_shape(n_targets: int = 16) -> Shape:
    """LLaVA-1.5-7B's: 32 layers of 4096 channels, expansion factor 2, k 32."""
    return Shape(tuple(range(32)), d_model=4096, n_latents=8192, k=32, n_targets=n_targets)


PLACED = (("float32", "adam"), ("float32", "adam8"), ("bfloat16", "adam8"), ("bfloat16", "signum"))
"""What the tables show: dtype of the weights, and optimiser."""


def table() -> str:
    """What the LLaVA-1.5-7B transcoder needs, by dtype and optimiser, in GB (1e9), as Markdown."""
    shape, tokens = llava_shape(), 4096
    lines = [
        f"{shape.n_parameters / 1e9:.2f} B parameters, {tokens} tokens a micro-batch, GB of 1e9 bytes",
        "",
        "| weights, optimiser | " + " | ".join(StepMemory._fields) + " | **device** |",
        "|---|" + "---|" * (len(StepMemory._fields) + 1),
    ]
    for dtype, optimizer in PLACED:
        memory = step_memory(shape, tokens=tokens, dtype=dtype, optimizer=optimizer)
        parts = " | ".join(f"{part / 1e9:.1f}" for part in memory)
        lines.append(f"| {dtype}, {optimizer} | {parts} | **{memory.device / 1e9:.1f}** |")
    return "\n".join(lines)


OFFLOAD_TOKENS = 65_536
"""Of a step with sixteen micro-batches of 4096"""
BUS_GB_PER_S = 25
"""What PCIe 4.0 with 16 lanes gives of its 32 GB/s"""


def offload_table() -> str:
    """The same with `--offload`, and what crosses the bus, as Markdown."""
    shape = llava_shape()
    head = [
        *StepMemory._fields[:-1],
        "**device**",
        "away",
        "bus, s a step",
        "s a million tokens at 4096",
    ]
    head.append(f"at {OFFLOAD_TOKENS}")
    lines = ["| weights, optimiser | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for dtype, optimizer in PLACED:
        step, away = memory = offload_memory(shape, tokens=4096, dtype=dtype, optimizer=optimizer)
        parts = " | ".join(f"{part / 1e9:.1f}" for part in step[:-1])
        seconds = 2 * memory.moved / 1e9 / BUS_GB_PER_S
        millions = " | ".join(f"{seconds * 1e6 / tokens:.0f}" for tokens in (4096, OFFLOAD_TOKENS))
        gb = f"**{step.device / 1e9:.1f}** | {away / 1e9:.1f}"
        lines.append(f"| {dtype}, {optimizer} | {parts} | {gb} | {seconds:.1f} | {millions} |")
    return "\n".join(lines)


def read_table() -> str:
    """What reading takes at LLaVA-1.5-7B's width with the default batch, in GB (1e9), as Markdown."""
    lines = ["| precision | --buffer-tokens | " + " | ".join(ReadMemory._fields) + " | **in all** |"]
    lines.append("|---|" + "---|" * (len(ReadMemory._fields) + 2))
    for precision in ("int8", "bf16"):
        for buffer in (4096, 8192, 16_384):
            sizes = {"buffer_tokens": buffer, "batch_tokens": 4096, "threads": 16}
            memory = read_memory(32, 4096, precision, **sizes)
            parts = " | ".join(f"{part / 1e9:.2f}" for part in memory)
            lines.append(f"| {precision} | {buffer} | {parts} | **{sum(memory) / 1e9:.2f}** |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), offload_table(), read_table(), sep="\n\n")
