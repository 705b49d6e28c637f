"""The cache's int8 codes, made where the activations are: a quarter of float32's bytes leave the device.

Bit for bit what `cache_format.int8.quantise` gives: the same operations in the same order, the sum of sizes
included, for which numpy's pairwise summation is followed. `agrees` checks that on the device in use.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache_format.errors import CacheError
from ..cache_format.int8 import GAUSSIAN, Measures, Quantised, quantise, quantise_into
from ..cache_format.layout import BLOCK, n_blocks

LARGEST_STEP = float(np.finfo(np.float16).max)
NUMPY_BLOCK, NUMPY_LANES = 128, 8
"""numpy adds up to so many numbers in so many running sums, and halves what is longer."""


class DeviceVectors(NamedTuple):
    """Quantised vectors on their device, with what the cache's statistics ask of each; see StoredVectors."""

    codes: Tensor
    """(token, d_model) int8"""
    scale: Tensor
    """(token, block) float16; not finite where the vector cannot be stored"""
    noise: Tensor
    """(token,) float32"""
    square: Tensor
    """(token,) float64"""
    peak: Tensor
    """(token,) float32"""

    def rows(self, tokens: slice) -> "DeviceVectors":
        return DeviceVectors(*(tensor[tokens] for tensor in self))


def form_of(tokens: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of DeviceVectors."""
    return {
        "codes": ((tokens, width), torch.int8),
        "scale": ((tokens, n_blocks(width)), torch.float16),
        "noise": ((tokens,), torch.float32),
        "square": ((tokens,), torch.float64),
        "peak": ((tokens,), torch.float32),
    }


def quantise_on_device(values: Tensor, divisor: float) -> DeviceVectors:
    """values: (token, d_model) of any float type."""
    tokens, width = values.shape
    blocks = n_blocks(width)
    exact = values.to(torch.float32, copy=True)  # changed in place below
    if width < blocks * BLOCK:
        exact = torch.nn.functional.pad(exact, (0, blocks * BLOCK - width))
    size = exact.abs()
    by_block = (tokens, blocks, BLOCK)
    peak = size.view(by_block).amax(dim=2)
    mean = pairwise_sum(size[:, :width]) / width
    factor = float(np.float32(GAUSSIAN / divisor))
    step = torch.maximum((mean * factor).clamp(max=LARGEST_STEP)[:, None], peak / 127)
    scale = _round_up_to_half(step)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    exact.view(by_block).mul_(inverse[:, :, None])
    rounded = torch.round(exact, out=size)
    codes = rounded[:, :width].to(torch.int8)
    area = scale.double().square()
    largest = (torch.round(peak * inverse) * scale).amax(dim=1)
    square = _squares(rounded.view(by_block), area)
    noise = _squares(exact.sub_(rounded).view(by_block), area)
    return DeviceVectors(codes, scale, noise.float(), square, largest)


def quantise_on_host(values: Tensor, divisor: float, out: DeviceVectors, rows: Tensor | None = None) -> None:
    """As `quantise_on_device`, by the codec itself on torch's threads, into contiguous `out`.

    values: (row, d_model). rows (token,): which of them are the tokens; None: all.
    """
    codes, scale, *measures = (tensor.numpy() for tensor in out)
    place, told = Quantised(codes, scale), Measures(*measures)
    which = None if rows is None else rows.numpy()
    try:
        quantise_into(place, values.float().numpy(), divisor, told, which, threads=torch.get_num_threads())
    except CacheError:  # the codec stops at the vector that cannot be stored; here its scale tells of it
        chosen = values if rows is None else values.index_select(0, rows)
        if len(chosen) == 1:
            for to, made in zip(out, quantise_on_device(chosen, divisor), strict=True):
                to.copy_(made)
            return
        for row in range(len(chosen)):  # the others are stored as ever, to the last bit of their noise
            quantise_on_host(chosen[row : row + 1], divisor, out.rows(slice(row, row + 1)))


def pairwise_sum(values: Tensor) -> Tensor:
    """(row,): sums of `values` (row, n), bit for bit those of numpy for contiguous rows."""
    rows, n = values.shape
    half = n // 2 - n // 2 % NUMPY_LANES
    if n > NUMPY_BLOCK and 2 * half == n:  # both halves at once: a device is asked to do less often
        halves = pairwise_sum(values.reshape(2 * rows, half)).view(rows, 2)
        return halves[:, 0] + halves[:, 1]
    if n > NUMPY_BLOCK:
        return pairwise_sum(values[:, :half]) + pairwise_sum(values[:, half:])
    whole = n - n % NUMPY_LANES
    total = torch.zeros(rows, device=values.device)
    if whole:
        lanes = values[:, :whole].reshape(rows, whole // NUMPY_LANES, NUMPY_LANES)
        sums = lanes[:, 0]
        for nth in range(1, lanes.shape[1]):
            sums = sums + lanes[:, nth]
        while sums.shape[1] > 1:
            sums = sums[:, 0::2] + sums[:, 1::2]
        total = sums[:, 0]
    for place in range(whole, n):
        total = total + values[:, place]
    return total


def agrees(device: torch.device, width: int, divisor: float) -> bool:
    """Whether this device gives the codec's codes and scales, on vectors of every size that float16 holds."""
    rng = np.random.default_rng(0)
    values = rng.standard_t(4, (256, width)).astype(np.float32)
    values *= np.exp2(rng.uniform(-30, 17, (256, 1))).astype(np.float32)
    values[::7, :: width // 3 + 1] *= 100
    values[0] = 0
    values.clip(-8e6, 8e6, out=values)  # more does not fit
    ours = quantise_on_device(torch.from_numpy(values).to(device), divisor)
    codes, scale = quantise(values, divisor)
    return np.array_equal(ours.codes.cpu().numpy(), codes) and np.array_equal(ours.scale.cpu().numpy(), scale)


def _round_up_to_half(step: Tensor) -> Tensor:
    """The smallest float16 that is not below `step` >= 0; inf where there is none, NaN stays."""
    half = step.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next one, for what is not negative
    return torch.where(half.float() < step, above, half)


def _squares(blocks: Tensor, area: Tensor) -> Tensor:
    """(token,): squared norms of vectors in units of their steps; area (token, block): squared steps."""
    return (blocks.square().sum(dim=2).double() * area).sum(dim=1)
