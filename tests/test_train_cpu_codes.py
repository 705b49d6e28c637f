"""The compiled loops of the step against dense products in float64; in other threads, the same bits."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clt.cache_format.layout import BLOCK
from clt.train import cpu_codes
from clt.train.reader import Batch
from clt.train.source import Rows
from clt.train.sparse import Codes, merge, rows_of

pytestmark = pytest.mark.skipif(not cpu_codes.COMPILED, reason="codes.c is not compiled here")
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_codes(tokens: int, latents: int, density: float) -> Codes:
    """Ragged rows, an empty one among them, and some explicit zeros."""
    places = torch.rand(tokens, latents) < density
    places[tokens // 2] = False
    return Codes.at(places, torch.rand(tokens, latents) * (torch.rand(tokens, latents) < 0.8))


def check_products(codes: Codes, width: int) -> list[Tensor]:
    """All products, each against a dense one; what was found."""
    dense = codes.dense().double()
    weight, grad = torch.randn(codes.n_latents, width), torch.randn(codes.n_tokens, width)
    out = codes.decode(weight, torch.ones_like(grad))
    torch.testing.assert_close(out, dense @ weight.double() + 1, **CLOSE)
    products = (grad.double() @ weight.double().T)[codes.tokens, codes.columns.long()]
    found = [out]
    for add in (False, True):
        weight_grad = torch.full_like(weight, 2.0 if add else float("nan"))
        code_grad = torch.ones_like(codes.values)
        codes.gradients(rows_of(grad, weight), weight, weight_grad, code_grad, add=add)
        torch.testing.assert_close(weight_grad, dense.T @ grad.double() + 2 * add, **CLOSE)
        torch.testing.assert_close(code_grad, products + 1, **CLOSE)
        encoder = torch.full_like(weight, 2.0 if add else float("nan"))
        codes.encoder_grad(codes.values, grad, encoder, add=add)
        torch.testing.assert_close(encoder, weight_grad, **CLOSE)
        found += [weight_grad, code_grad, encoder]
    return found


@given(
    tokens=st.integers(1, 40),
    latents=st.integers(1, 90),
    width=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 128, 130])),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_products_equal_dense_ones_in_any_number_of_threads(
    tokens: int, latents: int, width: int, density: float, seed: int
) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        found.append(check_products(random_codes(tokens, latents, density), width))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_more_latents_than_are_looked_at_together() -> None:
    torch.manual_seed(0)
    check_products(random_codes(23, 5000, 0.01), 100)


@given(seed=st.integers(0, 2**32), width=st.integers(1, 70), n_parts=st.integers(2, 4))
def test_merged_codes_may_have_a_latent_more_than_once(seed: int, width: int, n_parts: int) -> None:
    torch.manual_seed(seed)
    parts = [random_codes(9, 7, 0.5) for _ in range(n_parts)]
    merged, weight, grad = merge(parts), torch.randn(7, width), torch.randn(9, width)
    dense = sum(part.dense() for part in parts)
    torch.testing.assert_close(merged.decode(weight), dense @ weight, **CLOSE)
    weight_grad = torch.full_like(weight, float("nan"))
    found = merged.gradients(rows_of(grad, weight), weight, weight_grad, add=False)
    torch.testing.assert_close(weight_grad, dense.T @ grad, **CLOSE)
    for part, code_grad in zip(parts, found, strict=True):
        expected = (grad @ weight.T)[part.tokens, part.columns.long()]
        torch.testing.assert_close(code_grad, expected, **CLOSE)


@given(tokens=st.integers(1, 200), latents=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_the_transpose_is_a_stable_sort(tokens: int, latents: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = random_codes(tokens, latents, 0.3)
    starts, by_latent, order = codes.by_latent_order
    expected = torch.argsort(codes.columns, stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(by_latent.long(), codes.tokens[expected])
    assert torch.equal(starts.diff().long(), torch.bincount(codes.columns, minlength=latents))


@given(
    tokens=st.integers(1, 70),
    latents=st.integers(1, 700),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([0, 1, 3, 50]),
)
def test_top_k_takes_the_first_of_equal_ones(
    tokens: int, latents: int, share: float, seed: int, levels: int
) -> None:
    """levels: so many different values only; 0: any. Zeros fill up, at the lowest places."""
    torch.manual_seed(seed)
    k = max(1, round(share * latents))
    pre = torch.randn(tokens, latents)
    pre = (pre * levels).round() / levels if levels else pre
    values, columns = cpu_codes.top_k(pre, k)
    positive = pre.clamp(min=0)
    order = positive.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert torch.equal(columns.long(), order)
    assert torch.equal(values, positive.gather(1, order))


def test_top_k_never_loses_what_is_not_finite() -> None:
    pre = torch.randn(3, 300)
    pre[0, 7], pre[1, 299], pre[2, 0] = float("nan"), -float("nan"), float("inf")
    values, columns = cpu_codes.top_k(pre, 2)
    assert all(latent in row for latent, row in zip((7, 299, 0), columns.tolist(), strict=True))
    assert values.isfinite().sum(dim=1).tolist() == [1, 1, 1]


def test_numbers_that_do_not_belong_together_are_refused() -> None:
    """Rather than read, or written, somewhere else."""
    weight, out = torch.randn(3000, 5), torch.zeros(1, 5)
    starts, values = torch.tensor([0, 2], dtype=torch.int32), torch.ones(2)

    def codes(first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
        return starts, torch.tensor([first, second], dtype=torch.int32), values

    for latents in ((3, 3000), (-1, 2), (2999, 1)):
        with pytest.raises(ValueError, match="belong together"):
            cpu_codes.decode(codes(*latents), weight, out)
    with pytest.raises(ValueError, match="belong together"):
        cpu_codes.decode(codes(0, 1), weight, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="belong together"):
        cpu_codes.transpose(starts, codes(0, 3000)[1], 3000)


@given(tokens=st.integers(1, 70), width=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_standard_values_are_those_of_torch(tokens: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, width), dtype=torch.int8)
    steps, mean = torch.rand(tokens, -(-width // BLOCK)).half(), torch.randn(width)
    batch = Batch(Rows({"mlp_in": codes[None]}, {"mlp_in": steps[None]}), np.arange(tokens))
    expected = (batch.values("mlp_in", 0, mean.device, mean.dtype) - mean) / 0.7
    found = cpu_codes.standardise(codes, steps, mean, 0.7, BLOCK)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
