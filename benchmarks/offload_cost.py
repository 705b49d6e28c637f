"""What `--offload` costs in a step, and what it leaves on the device: the second part of bench_step.py.

Peaks are those of CUDA's allocator where there is a GPU. On a CPU the device is the process's own memory
(RssAnon, sampled): what is away on the disk is the kernel's; what is away on the host is the process's
own too. Each placement is a process of its own. Seconds are those of steps of 1, 2, 4, ... micro-batches
with the decoders on the device and away, in turns in one process; on a CPU they are the processor's, with
one thread, copies included, so that others on the machine do not count and nothing is hidden.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from synthetic_step import make_batch, make_model

from clt.train.memory import StepMemory, offload_memory, step_memory
from clt.train.optimizer import Optimizer
from clt.train.placement import ON_DEVICE, Offload, Placement, away_names, move, zeros_on_disk, zeros_on_host
from clt.train.shape import Shape
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, pageable_zeros

SHAPE = Shape(tuple(range(16)), d_model=576, n_latents=1152, k=32, n_targets=16)
TOKENS = 512
"""Of a micro-batch"""
PLACEMENTS = ("none", "host", "disk")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOCK = time.perf_counter if DEVICE.type == "cuda" else time.process_time


class Way:
    """A model that takes steps with its decoders in one place."""

    def __init__(self, offload: str, folder: Path) -> None:
        zeros = {"none": pageable_zeros, "host": zeros_on_host, "disk": zeros_on_disk(folder)}[offload]
        self.model: CrossLayerTranscoder = make_model(SHAPE, zeros)
        move(self.model, DEVICE, leave=away_names(self.model) if offload != "none" else [])
        self.optimizer, self.number = Optimizer(self.model, "adam"), 0
        self.placement: Placement = ON_DEVICE
        if offload != "none":
            self.placement = Offload(self.model, self.optimizer, zeros)

    def step(self, micro_batches: int) -> float:
        """Its seconds."""
        began = CLOCK()
        self.optimizer.begin(self.number, 1e-4)
        batches = [make_batch(SHAPE, TOKENS)] * micro_batches
        result = train_step(self.model, batches, self.optimizer.apply, placement=self.placement)
        float(result.loss)
        self.number += 1
        return CLOCK() - began


def compare_placements(repeats: int) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    memory = offload_memory(SHAPE, tokens=TOKENS)
    print(
        f"\n{SHAPE.n_layers} layers of {SHAPE.d_model}, {SHAPE.n_decoders} decoders, {TOKENS} tokens a "
        f"micro-batch, float32, adam; {memory.moved / 1e6:.0f} MB there and back in a step\n"
    )
    print("| decoders | peak of the device, MB | planned, MB |\n|---|---|---|")
    for offload in PLACEMENTS:
        command = [sys.executable, __file__, offload]
        peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"| {offload} | {peak / 1e6:.0f} | {planned(offload) / 1e6:.0f} |", flush=True)
    print("\n| micro-batches a step | on the device, s | host | disk | host costs | disk costs |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: Way(name, Path(folder)) for name in PLACEMENTS}
        for way in ways.values():
            way.step(1)
        for count in (1, 2, 4, 8):
            print(_row(ways, count, repeats), flush=True)


def _row(ways: dict[str, Way], count: int, repeats: int) -> str:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(way.step(count))
    middle = [f"{statistics.median(times):.2f}" for times in seconds.values()]
    costs = [
        statistics.median(b / a - 1 for a, b in zip(seconds["none"], seconds[name], strict=True))
        for name in ("host", "disk")
    ]
    return f"| {count} | {' | '.join(middle)} | {' | '.join(f'{cost:+.0%}' for cost in costs)} |"


def planned(offload: str) -> float:
    """By the formulas of train/memory.py."""
    memory: Any = offload_memory(SHAPE, tokens=TOKENS)
    if offload == "none":
        alone: StepMemory = step_memory(SHAPE, tokens=TOKENS)
        return alone.device
    on_its_own = DEVICE.type == "cuda" or offload == "disk"
    return float(memory.step.device + (0 if on_its_own else memory.away))


@contextmanager
def peak_bytes() -> Iterator[list[float]]:
    """Of what is taken within."""
    if DEVICE.type == "cuda":
        found = [0.0]
        yield found
        found[0] = torch.cuda.max_memory_allocated()
        return
    before, done = _own_bytes(), threading.Event()
    found = [0.0]

    def watch() -> None:
        while not done.is_set():
            found[0] = max(found[0], _own_bytes() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _own_bytes() -> int:
    """RssAnon of this process."""
    line = next(text for text in open("/proc/self/status") if text.startswith("RssAnon"))  # noqa: SIM115
    return int(line.split()[1]) * 1024


def main(offload: str) -> None:
    """Print one placement's peak over three steps."""
    small = Shape((0,), d_model=64, n_latents=64, k=2, n_targets=1)
    train_step(make_model(small), [make_batch(small, 9)], lambda *grads: None)  # libraries take their own
    make_batch(SHAPE, TOKENS)
    with tempfile.TemporaryDirectory() as folder, peak_bytes() as found:
        way = Way(offload, Path(folder))
        for _ in range(3):
            way.step(1)
    print(json.dumps(found[0]))


if __name__ == "__main__":
    main(sys.argv[1])
