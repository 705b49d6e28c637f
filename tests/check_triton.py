"""Run by test_train_triton.py in a process of its own, under Triton's interpreter."""

import torch

from clt.train.sparse import Codes
from clt.train.triton_codes import TILE, both_gradients, sum_rows


def random_codes(tokens: int, latents: int, density: float, dtype: torch.dtype) -> Codes:
    """Ragged rows, an empty one among them, and some explicit zeros."""
    places = torch.rand(tokens, latents) < density
    places[tokens // 2] = False
    values = torch.rand(tokens, latents) * (torch.rand(tokens, latents) < 0.8)
    return Codes.at(places, values.to(dtype))


def check(tokens: int, latents: int, width: int, density: float, dtype: torch.dtype) -> None:
    """Against dense products in float64 of the same rounded numbers."""
    codes = random_codes(tokens, latents, density, dtype)
    weight, grad = (torch.randn(n, width).to(dtype) for n in (latents, tokens))
    dense = codes.dense().double()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for add in (False, True):
        start = 2.0 if add else float("nan")
        out = torch.full((tokens, width), start, dtype=dtype)
        sum_rows(codes.starts, codes.columns, codes.values, weight, out, add=add)
        torch.testing.assert_close(out.double(), dense @ weight.double() + 2 * add, **close)

        weight_grad = torch.full((latents, width), start, dtype=dtype)
        code_grad = torch.ones(len(codes.values))
        order = codes.by_latent_order
        values = codes.values.index_select(0, order[2])
        both_gradients(order, values, grad, weight, weight_grad, code_grad, add=add)
        torch.testing.assert_close(weight_grad.double(), dense.T @ grad.double() + 2 * add, **close)
        wanted = (grad.double() @ weight.double().T)[codes.tokens, codes.columns.long()]
        torch.testing.assert_close(code_grad.double(), wanted + 1, rtol=1e-4, atol=1e-3)


torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    check(7, 5, 3, 0.5, dtype)
    check(5, 9, TILE + 17, 0.3, dtype)
    check(4, 3, TILE, 1.0, dtype)
    check(3, 6, 40, 0.0, dtype)
print("equal")
