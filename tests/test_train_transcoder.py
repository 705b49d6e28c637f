"""The transcoder against loops, in model units."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_transcoder import SHAPE, make_batch, make_model

from clt.train.activation import top_k
from clt.train.shape import Shape
from clt.train.sparse import Codes, merge
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, Standardiser


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_forward_equals_a_triple_loop(tie: str, skip: bool) -> None:
    """y_t = sum over its sources of a_s W_dec[s, t] + b_dec[t] + W_skip[t] x_t, in model units in and out."""
    model = make_model(replace(SHAPE, tie=tie, skip=skip))
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for token in range(5):
        for t in range(4):
            y = model.b_dec[t].detach().clone()
            for place, s in enumerate(range(max(0, t - 2), t + 1)):
                standard = (x[token, s] - model.inputs.mean[s]) / model.inputs.scale[s]
                pre = torch.relu(model.W_enc[s] @ standard + model.b_enc[s]).detach()
                for latent in pre.topk(4).indices:
                    layer = {"none": t, "source": s, "target": t}[tie]
                    weight = model.W_dec[layer][place] if tie == "none" else model.W_dec[layer]
                    y += pre[latent] * weight[latent].detach()
            if skip:
                y += model.W_skip[t].detach() @ ((x[token, t] - model.inputs.mean[t]) / model.inputs.scale[t])
            expected[token, t] = y * model.outputs.scale[t] + model.outputs.mean[t]
    torch.testing.assert_close(model(x).detach(), expected)


def test_without_a_skip_decoding_is_all_of_the_output() -> None:
    """With one, `decode` and `skip` add up to `forward`; a skip starts at zero."""
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    for model in (make_model(), make_model(replace(SHAPE, skip=True))):
        assert bool(model.skip(x).any()) == model.shape.skip
        torch.testing.assert_close(model(x), model.decode(model.encode(x)) + model.skip(x))
    assert not CrossLayerTranscoder(model.shape, model.inputs, model.outputs).skip(x).any()


def test_merged_codes_are_the_sum_and_split_again() -> None:
    """Codes of several sources as one matrix: dense sum; each source finds its own numbers again."""
    torch.manual_seed(0)
    pre = torch.randn(3, 9, 12)
    for parts in ([Codes.at(p > 0.5, p) for p in pre], [top_k(p, 4) for p in pre], [top_k(pre[0], 4)]):
        merged = merge(parts)
        assert merged.codes.starts[-1] == len(merged.codes.values)
        torch.testing.assert_close(merged.codes.dense(), sum(part.dense() for part in parts))
        for part, values in zip(parts, merged.split(merged.codes.values), strict=True):
            assert torch.equal(values, part.values)
        weight, grad = torch.randn(12, 5), torch.randn(9, 5)
        torch.testing.assert_close(merged.codes.decode(weight), merged.codes.dense() @ weight)
        torch.testing.assert_close(merged.codes.weight_grad(grad), merged.codes.dense().T @ grad)
        for part, values in zip(parts, merged.split(merged.codes.code_grad(grad, weight)), strict=True):
            torch.testing.assert_close(values, part.code_grad(grad, weight))


def test_encode_keeps_k_and_leaves_its_input_alone() -> None:
    model = make_model()
    x = torch.randn(20, 4, 16, dtype=torch.float64)
    before = x.clone()
    codes = model.encode(x)
    assert codes.shape == (20, 4, 40)
    assert int((codes > 0).sum(dim=2).max()) <= 4
    assert (codes >= 0).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize(("n_targets", "pairs"), [(1, 32), (16, 392), (32, 528), (99, 528)])
def test_number_of_decoders(n_targets: int, pairs: int) -> None:
    """LLaVA's 32 layers: 392 (source, target) pairs at n_targets 16, 528 when all reach all."""
    shape = Shape(tuple(range(32)), 4096, 8192, 32, n_targets)
    assert shape.n_pairs == pairs


def test_number_of_parameters() -> None:
    """The formula counts what the module holds; LLaVA's transcoder has 14.2 B."""
    for tie in ("none", "source", "target"):
        for skip in (False, True):
            shape = replace(SHAPE, tie=tie, skip=skip)
            assert shape.n_parameters == sum(p.numel() for p in make_model(shape).parameters())
    assert round(Shape(tuple(range(32)), 4096, 8192, 32, 16).n_parameters / 1e9, 1) == 14.2


def test_sources_of_a_target() -> None:
    """n_targets counts the own layer; oldest source first."""
    assert [list(SHAPE.sources(t)) for t in range(4)] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_top_k_is_sorted_and_not_negative() -> None:
    pre = torch.tensor([[3.0, -1.0, 5.0, 4.0], [-1.0, -2.0, -3.0, 2.0]])
    codes = top_k(pre, 2)
    assert codes.starts.tolist() == [0, 2, 4]
    assert codes.columns.tolist()[:2] == [2, 3]
    assert codes.values.tolist()[:2] == [5.0, 4.0]
    assert sorted(codes.values.tolist()[2:]) == [0.0, 2.0]


@given(
    arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 9))),
    st.integers(0, 2**32),
)
def test_sparse_products_equal_dense_ones(places: np.ndarray, seed: int) -> None:
    """decode, weight_grad, code_grad, encoder_grad and by_latent against a dense matrix, for any places."""
    random = np.random.default_rng(seed)
    tokens, latents = places.shape
    values, weight, grad, inputs = (
        torch.from_numpy(random.standard_normal(size))
        for size in ((tokens, latents), (latents, 7), (tokens, 7), (tokens, 3))
    )
    values = values.clamp(min=0)  # so that zeros are among the codes
    where = torch.from_numpy(places)
    codes, dense = Codes.at(where, values), values * where
    torch.testing.assert_close(codes.dense(), dense)
    torch.testing.assert_close(codes.decode(weight), dense @ weight)
    torch.testing.assert_close(codes.decode(weight, grad.clone()), grad + dense @ weight)
    for add, start in ((False, math.nan), (True, 2.0)):
        room = torch.full_like(weight, start)
        assert codes.weight_grad(grad, room, add=add) is room
        torch.testing.assert_close(room, dense.T @ grad + add * 2.0)
    code_grad = codes.code_grad(grad, weight)
    full = (grad @ weight.T) * where
    torch.testing.assert_close(code_grad, full[where])
    torch.testing.assert_close(codes.code_grad(grad, weight, code_grad.clone()), 2 * full[where])
    weight_grad, bias_grad = codes.encoder_grad(code_grad, inputs)
    torch.testing.assert_close(weight_grad, full.T @ inputs)
    torch.testing.assert_close(bias_grad, full.sum(dim=0))


def test_bfloat16_weights_compute_what_their_float32_copies_do() -> None:
    """Step, encode and forward; gradients come in float32."""
    half = make_model()
    sites = [Standardiser(s.mean.float(), s.scale.float()) for s in (half.inputs, half.outputs)]
    models = [CrossLayerTranscoder(SHAPE, *sites, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for name, parameter in models[0].named_parameters():
        parameter.data.copy_(half.get_parameter(name))
        models[1].get_parameter(name).data.copy_(parameter)
        assert parameter.dtype == (torch.bfloat16 if name[:5] in ("W_enc", "W_dec") else torch.float32)
    x = torch.randn(9, SHAPE.n_layers, SHAPE.d_model)
    found: list[dict[tuple[str, int, str], torch.Tensor]] = [{}, {}]
    for model, grads in zip(models, found, strict=True):

        def keep(side: str, layer: int, its: dict[str, torch.Tensor], grads: Any = grads) -> None:
            grads.update({(side, layer, name): grad.clone() for name, grad in its.items()})

        train_step(model, [make_batch(20, 1), make_batch(10, 2)], keep)
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items())
    assert all(grad.dtype == torch.float32 for grad in found[0].values())
    with torch.no_grad():
        assert torch.equal(models[0](x), models[1](x))
