"""The products of a step on a CUDA device: Triton's kernels, dense bfloat16 matmul, and embedding_bag.

    python benchmarks/cuda_steps.py [--tokens 8192] [--repeats 20]     # or bench_step.py, which ends with it

One (source, target) pair at LLaVA's width, k 32, bfloat16 rows: decode; both gradients of a decoder; the
encoder's weight gradient. Results are compared first, and the kernels' with themselves, bit for bit. The
limit is the device's bandwidth, measured by a copy, for reading from memory each row that a code names. A
share above 100 % means that L2 held rows.

TRITON_INTERPRET=1 python benchmarks/cuda_steps.py --dry     # tiny, on a CPU: that all ways agree
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clt.train.sparse import Codes

WIDTH, K, LATENTS = 4096, 32, (8192, 32_768)


class Products(NamedTuple):
    """What each way computes."""

    decoded: Tensor
    """(token, d_model)"""
    weight_grad: Tensor
    """(latent, d_model)"""
    code_grad: Tensor
    """(code,)"""
    encoder_grad: Tensor
    """(latent, d_model)"""


class Numbers(NamedTuple):
    codes: Codes
    weight: Tensor
    """(latent, d_model) bfloat16"""
    grad: Tensor
    """(token, d_model) bfloat16: of the output"""
    inputs: Tensor
    """(token, d_model) bfloat16"""
    pre_grad: Tensor
    """(code,) float32"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    if asked.dry:
        check(random_numbers(6, 16, 40, 4, "cpu"))
        print("all ways agree")
    elif torch.cuda.is_available():
        report(asked.tokens, asked.repeats)
    else:
        raise SystemExit("there is no CUDA device; --dry compares the ways on a CPU")


def report(n_tokens: int = 8192, repeats: int = 20) -> None:
    """Print a table for each number of latents."""
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"\n{name}: a copy moves {bandwidth / 1e9:.0f} GB/s; {n_tokens} tokens, d_model {WIDTH}, k {K}")
    for latents in LATENTS:
        numbers = random_numbers(n_tokens, latents, WIDTH, K, "cuda")
        check(numbers)
        gathered = 3 * n_tokens * K * WIDTH * 2  # decode, both gradients, encoder: one bfloat16 row a code
        print(f"\n{latents} latents\n\n| products | ms | tokens/s | of the limit |\n|---|---|---|---|")
        for way in (kernels, dense, bag):
            seconds = time_on_device(partial(way, numbers), repeats)
            share = f"{gathered / seconds / bandwidth:.0%}" if way is not dense else "-"
            rate = n_tokens / seconds
            print(f"| {way.__doc__} | {seconds * 1e3:.2f} | {rate:.0f} | {share} |", flush=True)


def kernels(numbers: Numbers) -> Products:
    """Triton"""
    from clt.train.triton_codes import both_gradients, sum_rows

    codes, weight, grad, inputs, pre_grad = numbers
    decoded = torch.empty(grad.shape, device=grad.device)
    sum_rows(codes.starts, codes.columns, codes.values, weight, decoded, add=False)
    starts, tokens, order = codes.by_latent_order
    weight_grad, encoder_grad = (torch.empty(weight.shape, device=grad.device) for _ in range(2))
    code_grad = torch.zeros_like(codes.values)
    values = codes.values[order]
    both_gradients(codes.by_latent_order, values, grad, weight, weight_grad, code_grad, add=False)
    sum_rows(starts, tokens, pre_grad[order], inputs, encoder_grad, add=False)
    return Products(decoded, weight_grad, code_grad, encoder_grad)


def dense(numbers: Numbers) -> Products:
    """dense bfloat16"""
    codes, weight, grad, inputs, pre_grad = numbers
    activations = codes.dense().to(weight.dtype)
    places = (codes.tokens, codes.columns.long())
    pre_dense = torch.zeros_like(activations).index_put_(places, pre_grad.to(weight.dtype))
    code_grad = (grad @ weight.T)[places].float()
    return Products(activations @ weight, activations.T @ grad, code_grad, pre_dense.T @ inputs)


def bag(numbers: Numbers) -> Products:
    """embedding_bag, and a COO product for the encoder"""
    codes, weight, grad, inputs, pre_grad = numbers
    leaf, values = weight.detach().requires_grad_(), codes.values.to(weight.dtype).requires_grad_()
    decoded = F.embedding_bag(codes.columns, leaf, codes.starts[:-1], per_sample_weights=values, mode="sum")
    decoded.backward(grad)
    assert leaf.grad is not None
    assert values.grad is not None
    size, places = (len(weight), len(inputs)), torch.stack([codes.columns.long(), codes.tokens])
    matrix = torch.sparse_coo_tensor(places, pre_grad, size, check_invariants=False)
    return Products(decoded.detach(), leaf.grad, values.grad, torch.sparse.mm(matrix, inputs.float()))


def check(numbers: Numbers) -> None:
    """All ways give the same to bfloat16's precision, and the kernels the same bits twice."""
    mine, again = kernels(numbers), kernels(numbers)
    for name, one, two in zip(Products._fields, mine, again, strict=True):
        if not torch.equal(one, two):
            raise SystemExit(f"{name} differs between two runs of the same kernels")
    for way in (dense, bag):
        for name, one, other in zip(Products._fields, mine, way(numbers), strict=True):
            difference = float((one - other.float()).norm() / one.norm())
            if difference > 0.02:
                raise SystemExit(f"{way.__doc__}: {name} differs by {difference:.1%}")


def random_numbers(tokens: int, latents: int, width: int, k: int, device: str) -> Numbers:
    """k latents of each token, at random."""
    torch.manual_seed(0)
    indices = torch.rand(tokens, latents, device=device).topk(k, dim=1).indices.sort(dim=1).values
    codes = Codes.rectangle(torch.rand(tokens, k, device=device), indices, latents)
    rows = [torch.randn(n, width, device=device).bfloat16() for n in (latents, tokens, tokens)]
    return Numbers(codes, *rows, torch.randn(tokens * k, device=device))


def time_on_device(work: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_on_device(lambda: target.copy_(source), 20)


if __name__ == "__main__":
    main()
