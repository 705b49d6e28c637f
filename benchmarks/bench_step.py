"""One training step against two other ways to take it, on one machine, in one run; and what it needs.

    python benchmarks/bench_step.py [--widths 576,4096] [--tokens 2048] [--repeats 3] [--threads N]
    python benchmarks/bench_step.py --offload [--repeats 3]     # see offload_cost.py

Each way reads the same batch of int8 codes, computes the same loss and gradients (checked before anything is
timed), and ends with the same fused Adam. Repetitions alternate, so that a busy machine slows all alike. Then
come the kernels that the step is in, what the reader could deliver, and memory beside its formula; where
there is a CUDA device, cuda_steps.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cuda_steps
import step_memory
import step_profile
import step_reader
import torch
import torch.nn.functional as F
from rival_steps import Leaves, dense_step, eleuther_step
from synthetic_step import SHAPES, make_batch, make_model
from torch import Tensor

from clt.train.optimizer import Optimizer
from clt.train.reader import Batch
from clt.train.shape import Shape
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder

TOLERANCE = 1e-3
"""Largest relative difference, in norm, of any gradient between two ways, in float32."""
NEAR = 1e-5
"""Two latents whose values differ by less, relatively, may change places with the last bits of the inputs."""


class Way(NamedTuple):
    name: str
    step: Callable[[], Tensor]
    """One forward and backward pass; the loss."""
    update: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default=",".join(map(str, SHAPES)))
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--offload", action="store_true", help="only what it costs to have decoders elsewhere"
    )
    asked = parser.parse_args()
    if asked.offload:
        from offload_cost import compare_placements

        compare_placements(asked.repeats)
        return
    torch.set_num_threads(asked.threads)
    for width in map(int, asked.widths.split(",")):
        rate = compare(SHAPES[width], asked.tokens, asked.repeats)
        step_reader.report(SHAPES[width], asked.tokens, rate)
        step_memory.report(width, asked.tokens)
    if torch.cuda.is_available():
        cuda_steps.report()
    else:
        print("\nThere is no CUDA device: nothing was measured of the kernels in train/triton_codes.py.")


def compare(shape: Shape, n_tokens: int, repeats: int) -> float:
    """Print the table for one shape, and where our step's time goes; our tokens/s."""
    print(
        f"\nd_model {shape.d_model}, {shape.n_latents} latents, k {shape.k}, {shape.n_layers} layers, ",
        end="",
    )
    print(f"{shape.n_pairs} decoders, {n_tokens} tokens; {torch.get_num_threads()} threads, float32")
    model, batch = make_model(shape), make_batch(shape, n_tokens)
    leaves, adam = Leaves(model), Optimizer(model, "adam")
    check_gradients(model, leaves, batch)
    adam.begin(0, 1e-4)
    leaves.share_state(adam)
    ways = [
        Way("ours", lambda: train_step(model, [batch], adam.apply).loss, lambda: None),
        Way("dense autograd", lambda: dense_step(leaves, batch), leaves.update),
        Way("EleutherAI's formulation", lambda: eleuther_step(leaves, batch), leaves.update),
    ]
    seconds = alternate(ways, repeats)
    ours = seconds["ours"]
    print(
        "\n| step and optimiser | median s | spread | tokens/s | ours is faster by |\n|---|---|---|---|---|"
    )
    for name, times in seconds.items():
        middle = statistics.median(times)
        ratios = [theirs / mine for theirs, mine in zip(times, ours, strict=True)]
        print(
            f"| {name} | {middle:.3f} | {min(times):.3f}-{max(times):.3f} | {n_tokens / middle:.0f} | "
            f"{statistics.median(ratios):.1f}x |",
            flush=True,
        )
    step_profile.report(ways[0].step)
    return n_tokens / statistics.median(ours)


def alternate(ways: list[Way], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition, by name; the ways take turns (each has taken one step before)."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            began = time.perf_counter()
            way.step()
            way.update()
            seconds[way.name].append(time.perf_counter() - began)
    return seconds


def check_gradients(model: CrossLayerTranscoder, leaves: Leaves, batch: Batch) -> None:
    """All ways give the same loss and the same gradients, of tokens whose k-th latent is no near tie."""
    batch = decided(leaves, batch)
    mine: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        mine.update({(name, layer): grad.clone() for name, grad in grads.items()})

    loss = train_step(model, [batch], keep).loss
    names = [(name, s) for name in ("W_enc", "b_enc", "W_dec", "b_dec") for s in range(model.shape.n_layers)]
    for step in (dense_step, eleuther_step):
        theirs = step(leaves, batch)
        worst = max(
            float((mine[name] - grad).norm() / grad.norm())
            for name, grad in zip(names, leaves.gradients(), strict=True)
        )
        leaves.adam.zero_grad(set_to_none=True)
        difference = abs(float(loss / theirs) - 1)
        print(f"against {step.__name__}: loss differs by {difference:.0e}, gradients by at most {worst:.0e}")
        if difference > TOLERANCE or worst > TOLERANCE:
            raise SystemExit(f"{step.__name__} computes something else")


@torch.no_grad()
def decided(leaves: Leaves, batch: Batch) -> Batch:
    """Without the tokens for which in any layer the k-th latent and the next one are nearly equal."""
    clear = torch.ones(len(batch), dtype=torch.bool)
    for s, (weight, bias) in enumerate(zip(leaves.W_enc, leaves.b_enc, strict=True)):
        pre = F.linear(leaves.values(batch, "mlp_in", s), weight, bias)
        last, next_one = pre.topk(leaves.shape.layer_k[s] + 1).values[:, -2:].T
        clear &= last - next_one > NEAR * last
    places = clear.nonzero()[:, 0].numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return Batch(batch.rows.take(places, pool), batch.token[places])


if __name__ == "__main__":
    main()
