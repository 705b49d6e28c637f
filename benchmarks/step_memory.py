"""What a step's memory is, beside the formula of train/memory.py: one process for each line of the table.

    python benchmarks/step_memory.py WIDTH TOKENS DTYPE OPTIMIZER TIE    # bytes at the peak, as a number

Resident memory is counted from the moment when the libraries are loaded and have taken a tiny step. The table
has it twice: with pages of its own for each large tensor, as a GPU's allocator does it, and as glibc does it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from synthetic_step import SHAPES, make_batch, make_model

from clt.train.memory import step_memory
from clt.train.optimizer import Optimizer
from clt.train.shape import Shape
from clt.train.step import train_step

CASES = {
    576: [
        ("float32", "adam", "none"),
        ("float32", "adam", "source"),
        ("float32", "adam8", "none"),
        ("float32", "muon", "none"),
        ("bfloat16", "adam8", "none"),
        ("bfloat16", "signum", "target"),
    ],
    4096: [("float32", "adam", "none"), ("bfloat16", "adam8", "none")],
}
"""(dtype, optimizer, tie) by width"""
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Large tensors get pages of their own, that go with them. glibc's heap keeps some, in no fixed way."""


def report(width: int, tokens: int) -> None:
    """Print the table for one width."""
    print(
        "\n| dtype, optimiser, tie | formula MB | measured peak MB | measured / formula | glibc's heap |\n"
        "|---|---|---|---|---|"
    )
    for dtype, optimizer, tie in CASES[width]:
        found, formula = measured_and_formula(width, tokens, dtype, optimizer, tie)
        heap, _ = measured_and_formula(width, tokens, dtype, optimizer, tie, environment={})
        ratios = f"{found / formula:.2f} | {heap / formula:.2f}"
        print(
            f"| {dtype}, {optimizer}, {tie} | {formula / 1e6:.0f} | {found / 1e6:.0f} | {ratios} |",
            flush=True,
        )


def measured_and_formula(
    width: int, tokens: int, dtype: str, optimizer: str, tie: str, environment: dict[str, str] = OWN_PAGES
) -> tuple[int, int]:
    """Bytes; measured in a process of its own."""
    shape = replace(SHAPES[width], tie=tie)
    formula = step_memory(shape, tokens=tokens, dtype=dtype, optimizer=optimizer).total
    command = [sys.executable, __file__, str(width), str(tokens), dtype, optimizer, tie]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout), formula


def measure(shape: Shape, tokens: int, dtype: torch.dtype, optimizer: str) -> int:
    """Bytes that model, batch and two steps take at their peak, beyond what a tiny step needs."""
    tiny = replace(shape, layers=(0, 1), d_model=128, n_latents=256, k=8, n_targets=2)
    take_steps(tiny, 8, dtype, optimizer)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    take_steps(shape, tokens, dtype, optimizer)
    return resident("VmHWM") - before


def take_steps(shape: Shape, tokens: int, dtype: torch.dtype, optimizer: str) -> None:
    model, batch = make_model(shape, dtype=dtype), make_batch(shape, tokens)
    rule = Optimizer(model, optimizer)
    for step in range(2):
        rule.begin(step, 1e-4)
        train_step(model, [batch], rule.apply)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    width, tokens, dtype, optimizer, tie = sys.argv[1:]
    print(measure(replace(SHAPES[int(width)], tie=tie), int(tokens), getattr(torch, dtype), optimizer))
