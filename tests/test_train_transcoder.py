"""The transcoder against loops, in model units."""

import pytest
import torch
from tiny_transcoder import SHAPE, make_model

from clt.train.sparse import Codes, top_k
from clt.train.transcoder import Shape


def test_forward_equals_a_triple_loop() -> None:
    """y_t = sum over its sources of a_s W_dec[s, t] + b_dec[t], in model units in and out."""
    model = make_model()
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for token in range(5):
        for t in range(4):
            y = model.b_dec[t].detach().clone()
            for place, s in enumerate(range(max(0, t - 2), t + 1)):
                standard = (x[token, s] - model.inputs.mean[s]) / model.inputs.scale[s]
                pre = torch.relu(model.W_enc[s] @ standard + model.b_enc[s]).detach()
                for latent in pre.topk(4).indices:
                    y += pre[latent] * model.W_dec[t][place, latent].detach()
            expected[token, t] = y * model.outputs.scale[t] + model.outputs.mean[t]
    torch.testing.assert_close(model(x).detach(), expected)


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
    model = make_model()
    assert SHAPE.n_parameters == sum(p.numel() for p in model.parameters())
    assert round(Shape(tuple(range(32)), 4096, 8192, 32, 16).n_parameters / 1e9, 1) == 14.2


def test_sources_of_a_target() -> None:
    """n_targets counts the own layer; oldest source first."""
    assert [list(SHAPE.sources(t)) for t in range(4)] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_top_k_is_sorted_and_not_negative() -> None:
    pre = torch.tensor([[3.0, -1.0, 5.0, 4.0], [-1.0, -2.0, -3.0, 2.0]])
    codes = top_k(pre, 2)
    assert codes.indices.tolist()[0] == [2, 3]
    assert codes.values.tolist()[0] == [5.0, 4.0]
    assert sorted(codes.values.tolist()[1]) == [0.0, 2.0]


def test_sparse_products_equal_dense_ones() -> None:
    """decode, weight_grad, code_grad and encoder_grad against the same with a dense matrix."""
    torch.manual_seed(0)
    pre, weight = torch.randn(11, 30, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    grad, inputs = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 9, dtype=torch.float64)
    codes = Codes(top_k(pre, 5), 30)
    dense = torch.zeros(11, 30, dtype=torch.float64).scatter_(1, codes.indices, codes.values)
    torch.testing.assert_close(codes.decode(weight), dense @ weight)
    torch.testing.assert_close(codes.weight_grad(grad), dense.T @ grad)
    code_grad = codes.code_grad(grad, weight)
    torch.testing.assert_close(code_grad, (grad @ weight.T).gather(1, codes.indices))
    masked = torch.zeros_like(dense).scatter_(1, codes.indices, code_grad * (codes.values > 0))
    weight_grad, bias_grad = codes.encoder_grad(code_grad, inputs)
    torch.testing.assert_close(weight_grad, masked.T @ inputs)
    torch.testing.assert_close(bias_grad, masked.sum(dim=0))
