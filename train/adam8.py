"""Adam with 8-bit moments (Dettmers et al. 2022, arXiv 2110.02861): 2.03 bytes a value.

Each block of 256 values shares a float32 absmax; a value over it is stored as the nearest of the 256 entries
of a dynamic table: some bits of the code are a decimal exponent, the rest a linear fraction, so that large
and small values keep some digits. Moments are read, advanced and used in float32; what is kept is rounded.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adam import BETA1, BETA2, EPSILON, State

BLOCK = 256
DECADES = 7
STATE = ("exp_avg_code", "exp_avg_absmax", "exp_avg_sq_code", "exp_avg_sq_absmax")


def slab_size(device: torch.device) -> int:
    """Values updated together: with a dozen temporaries they stay in a CPU's cache, three times as fast."""
    return 2**23 if device.type == "cuda" else 2**15


def dynamic_table(signed: bool) -> Tensor:
    """256 values in [-1, 1] or [0, 1], ascending; those of bitsandbytes' `create_dynamic_map`.

    Decade i = 0..6 ends at 10**(i - 6) and is cut evenly into 2**i parts (2**(i + 1) unsigned), whose middles
    are in the table, with both signs if signed; 0 and 1 complete it.
    """
    found = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles = 10.0 ** (decade + 1 - DECADES) * (edges[:-1] + edges[1:]) / 2
        found += [middles, -middles] if signed else [middles]
    return torch.cat(found).sort().values.float()


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table, and the limits between which a value belongs to an entry."""
    table = dynamic_table(signed)
    limits = (table[1:] + table[:-1]) / 2
    if not signed:  # a second moment of 0 under a first that is not would make a step of any size
        limits[0] = 0.0
    return table.to(device), limits.to(device)


def quantise_blocks(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 (n,) -> codes uint8 (n,) and absmax float32 (ceil(n / 256),).

    Unsigned: what is positive never becomes 0 (here alone this departs from bitsandbytes).
    """
    return _quantise(values, _tables(signed, values.device)[1])


def dequantise_blocks(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """What `quantise_blocks` kept: float32 (n,)."""
    return _dequantise(codes, absmax, _tables(signed, codes.device)[0])


def _quantise(values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    shares = blocks / absmax.clamp(min=torch.finfo(values.dtype).tiny)[:, None]
    codes = torch.bucketize(shares, limits, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], absmax


def _dequantise(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    shares = pad(table[codes.int()], (0, -len(codes) % BLOCK)).view(-1, BLOCK)
    return shares.mul_(absmax[:, None]).view(-1)[: len(codes)]


class Adam8:
    """For weights in float32 or bfloat16. Compiled, the update is one pass over the values, not twenty."""

    def __init__(self, compiled: bool = False) -> None:
        self._advance = _compiled() if compiled else _advance

    def new_state(self, weight: Tensor) -> State:
        state = {}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zero = int((dynamic_table(signed) == 0).nonzero())
            state[f"{name}_code"] = torch.full_like(weight, zero, dtype=torch.uint8)
            state[f"{name}_absmax"] = torch.zeros(-(-weight.numel() // BLOCK), device=weight.device)
        return state

    def pieces(self, weight: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
        values, grads = weight.view(-1), grad.reshape(-1)
        size = slab_size(weight.device)
        for start in range(0, len(values), size):
            here, blocks = slice(start, start + size), slice(start // BLOCK, (start + size) // BLOCK)
            yield (
                values[here],
                grads[here],
                {n: t.view(-1)[here if n.endswith("_code") else blocks] for n, t in state.items()},
            )

    def update(self, weight: Tensor, grad: Tensor, state: State, lr: float, step: int) -> None:
        rates = torch.tensor([-lr / (1 - BETA1**step), (1 - BETA2**step) ** 0.5], device=weight.device)
        tables = [_tables(signed, weight.device) for signed in (True, False)]
        self._advance(weight, grad, [state[name] for name in STATE], tables, rates)


def _advance(
    weight: Tensor, grad: Tensor, state: list[Tensor], tables: list[tuple[Tensor, Tensor]], rates: Tensor
) -> None:
    """One step in place; state: codes and absmax of both moments; rates: -lr and the root, bias corrected."""
    (signed, signed_limits), (positive, positive_limits) = tables
    first = _dequantise(state[0], state[1], signed).lerp_(grad, 1 - BETA1)
    second = _dequantise(state[2], state[3], positive).mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    kept = (*_quantise(first, signed_limits), *_quantise(second, positive_limits))
    for place, values in zip(state, kept, strict=True):
        place.copy_(values)
    denominator = second.sqrt_().div_(rates[1]).add_(EPSILON)
    weight.add_(first.mul_(rates[0]).div_(denominator))


@cache
def _compiled() -> Callable[..., None]:
    """`_advance` as one kernel, for any length."""
    return torch.compile(_advance, dynamic=True)
