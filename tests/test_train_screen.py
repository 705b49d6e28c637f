"""Top-k that is screened in bfloat16 against float64: no latent that belongs there is lost."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_transcoder import make_batch, make_model
from torch import Tensor

from clt.train import cpu_codes, screen
from clt.train.shape import Shape
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, Standardiser

pytestmark = pytest.mark.skipif(not cpu_codes.COMPILED, reason="codes.c is not compiled here")


def exact(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (inputs.double() @ weight.double().T + bias).clamp(min=0)


@given(
    tokens=st.integers(1, 70),
    width=st.integers(1, 100),
    latents=st.integers(1, 300),
    k=st.integers(1, 40),
    alike=st.sampled_from([0.0, 0.9, 1.0]),
    outliers=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 2**32),
)
@example(tokens=70, width=100, latents=300, k=3, alike=1.0, outliers=1e4, seed=0)
def test_nothing_is_lost(
    tokens: int, width: int, latents: int, k: int, alike: float, outliers: float, seed: int
) -> None:
    """alike: how much of all latents is the same, so that rounding changes their order."""
    torch.manual_seed(seed)
    k = min(k, latents)
    inputs, bias = torch.randn(tokens, width), 0.1 * torch.randn(latents)
    inputs[:, 0] *= outliers
    weight = alike * torch.randn(width) + (1 - alike + 1e-4) * torch.randn(latents, width)
    small = screen.rounded(weight)
    torch.testing.assert_close(small.halves, weight.bfloat16(), rtol=0, atol=0)
    codes = screen.top_k(inputs, weight, small, bias, k)
    if codes is None:  # latents are too much alike
        assert latents > max(2 * k, latents // screen.FEW)
        return
    truth = exact(inputs, weight, bias)
    room = 1e-5 * float(inputs.norm(dim=1).max() * weight.norm(dim=1).max())
    largest = truth.topk(k, dim=1).values
    found = codes.values.view(tokens, k)
    torch.testing.assert_close(found.sort(dim=1, descending=True).values.double(), largest, rtol=0, atol=room)
    here = truth.gather(1, codes.columns.view(tokens, k).long())
    torch.testing.assert_close(found.double(), here, rtol=0, atol=room)
    assert (codes.columns.view(tokens, k).diff(dim=1) > 0).all()


def test_latents_that_stand_apart_are_screened() -> None:
    """So that the test above does not pass because screening always gives up."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(40, 256), torch.randn(1000, 256)
    codes = screen.top_k(inputs, weight, screen.rounded(weight), torch.zeros(1000), 8)
    assert codes is not None
    plain = cpu_codes.top_k(inputs @ weight.T, 8)
    assert torch.equal(codes.columns.view(40, 8), plain[1])


def test_a_nan_is_not_lost() -> None:
    inputs, weight = torch.randn(3, 64), torch.randn(200, 64)
    inputs[1, 5] = float("nan")
    codes = screen.top_k(inputs, weight, screen.rounded(weight), torch.zeros(200), 4)
    assert codes is None or codes.values.isnan().any()


def test_a_screened_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two micro-batches, with and without."""
    shape = Shape((0, 1, 2), d_model=130, n_latents=300, k=5, n_targets=3)
    wide = make_model(shape)
    sites = [Standardiser(s.mean.float(), s.scale.float()) for s in (wide.inputs, wide.outputs)]
    model = CrossLayerTranscoder(shape, sites[0], sites[1])
    for mine, other in zip(model.parameters(), wide.parameters(), strict=True):
        mine.data.copy_(other)
    found: list[dict[tuple[str, int], Tensor]] = []
    screened = []
    plain = screen.top_k

    def watched(*arguments: object) -> object:
        screened.append(plain(*arguments))  # type: ignore[arg-type]
        return screened[-1]

    monkeypatch.setattr(screen, "top_k", watched)
    for worth in (False, True):
        monkeypatch.setattr(screen, "is_worth_it", lambda weight, worth=worth: worth)
        grads: dict[tuple[str, int], Tensor] = {}

        def keep(side: str, layer: int, its: dict[str, Tensor], grads: object = grads) -> None:
            grads.update({(name, layer): grad.clone() for name, grad in its.items()})  # type: ignore[attr-defined]

        train_step(model, [make_batch(20, 1, shape), make_batch(9, 2, shape)], keep)
        found.append(grads)
    assert len(screened) == 6
    assert all(codes is not None for codes in screened)
    for key, grad in found[0].items():
        assert float((grad - found[1][key]).norm()) <= 1e-5 * float(grad.norm()), key
