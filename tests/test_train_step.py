"""The target-major step against autograd on a naive dense transcoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_transcoder import SHAPE, make_batch, make_model
from torch import Tensor

from clt.cache_format.layout import SITES
from clt.train.optimizer import Optimizer
from clt.train.reader import Batch
from clt.train.step import train_step
from clt.train.stored_rows import Rows
from clt.train.transcoder import CrossLayerTranscoder


def naive_loss(model: CrossLayerTranscoder, batch: Batch, variance: str) -> Tensor:
    """Sum over targets of FVU, dense, in one graph: the definition, written out."""
    device, dtype, shape = torch.device("cpu"), torch.float64, model.shape
    activations, loss = [], torch.zeros((), dtype=dtype)
    for s in range(shape.n_layers):
        x = (batch.values("mlp_in", s, device, dtype) - model.inputs.mean[s]) / model.inputs.scale[s]
        pre = torch.relu(x @ model.W_enc[s].T + model.b_enc[s])
        kth = pre.topk(shape.k, dim=1).values[:, -1:]
        activations.append(pre * (pre >= kth))
    for t in range(shape.n_layers):
        y = (batch.values("mlp_out", t, device, dtype) - model.outputs.mean[t]) / model.outputs.scale[t]
        predicted = model.b_dec[t]
        for place, s in enumerate(s for s in range(shape.n_layers) if t - shape.n_targets < s <= t):
            tied = {"source": model.W_dec[s], "target": model.W_dec[t]}
            weight = model.W_dec[t][place] if shape.tie == "none" else tied[shape.tie]
            predicted = predicted + activations[s] @ weight
        if shape.skip:
            x = (batch.values("mlp_in", t, device, dtype) - model.inputs.mean[t]) / model.inputs.scale[t]
            predicted = predicted + x @ model.W_skip[t].T
        total = y.numel() if variance == "cache" else (y - y.mean(dim=0)).square().sum()
        loss = loss + (y - predicted).square().sum() / total
    return loss


def gradients(
    model: CrossLayerTranscoder, batches: list[Batch], variance: str = "cache"
) -> tuple[dict, Tensor]:
    found = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        found.update({(name, layer): grad.clone() for name, grad in grads.items()})

    result = train_step(model, batches, keep, variance)
    return found, result.loss


def joined(parts: list[Batch]) -> Batch:
    """One batch that holds the tokens of all."""
    codes = {site: np.concatenate([p.rows.codes[site] for p in parts], axis=1) for site in SITES}
    scales = {site: np.concatenate([p.rows.scales[site] for p in parts], axis=1) for site in SITES}
    return Batch(Rows(codes, scales), np.arange(sum(len(part) for part in parts)))


@pytest.mark.parametrize("variance", ["cache", "batch"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n_targets", [1, 2, 99])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_gradients_equal_autograd(tie: str, n_targets: int, skip: bool, variance: str) -> None:
    """Every gradient of the joint loss over three micro-batches, to 1e-10 in float64."""
    shape = replace(SHAPE, n_targets=n_targets, tie=tie, skip=skip)
    model, parts = make_model(shape), [make_batch(n, n, shape) for n in (8, 5, 19)]
    found, loss = gradients(model, parts, variance)
    expected = naive_loss(model, joined(parts), variance)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert len(found) == len(list(model.parameters()))
    for (name, layer), grad in found.items():
        reference = getattr(model, name)[layer].grad
        assert reference.abs().max() > 0, (name, layer)
        assert (grad - reference).abs().max() < 1e-10 * reference.abs().max(), (name, layer)


@pytest.mark.parametrize("n_layers", [1, 2, 7])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_gradients_equal_autograd_with_few_and_many_layers(tie: str, n_layers: int) -> None:
    shape = replace(SHAPE, layers=tuple(range(3, 3 + 2 * n_layers, 2)), tie=tie, skip=True)
    model, batch = make_model(shape), make_batch(12, 4, shape)
    found, _ = gradients(model, [batch])
    naive_loss(model, batch, "cache").backward()
    for (name, layer), grad in found.items():
        torch.testing.assert_close(grad, getattr(model, name)[layer].grad, rtol=1e-9, atol=1e-14)


def test_micro_batches_add_up() -> None:
    """The step of three micro-batches is the step of one batch that holds their tokens."""
    model, parts = make_model(), [make_batch(n, n) for n in (8, 5, 19)]
    whole = joined(parts)
    for variance in ("cache", "batch"):
        split, loss = gradients(model, parts, variance)
        joint, whole_loss = gradients(model, [whole], variance)
        assert float(loss) == pytest.approx(float(whole_loss), rel=1e-12)
        for key, grad in joint.items():
            torch.testing.assert_close(split[key], grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_step_equals_adam_on_the_joint_loss(tie: str) -> None:
    """Ten updates layer by layer are ten updates of torch's Adam on all parameters at once.

    So no target is decoded with weights that the step has changed already.
    """
    shape = replace(SHAPE, tie=tie, skip=True)
    ours, theirs = make_model(shape), make_model(shape)
    optimizer = Optimizer(ours, "adam")
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for number in range(10):
        batch = make_batch(20, number)
        optimizer.begin(number, 1e-2)
        train_step(ours, [batch], optimizer.apply)
        reference.zero_grad()
        naive_loss(theirs, batch, "cache").backward()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def test_gradient_norm_is_that_of_all_gradients() -> None:
    model, batch = make_model(), make_batch(12, 3)
    optimizer = Optimizer(model, "adam")
    optimizer.begin(0, 1e-3)
    found, _ = gradients(model, [batch])
    train_step(model, [batch], optimizer.apply)
    expected = sum(float(grad.square().sum()) for grad in found.values())
    assert optimizer.grad_norm**2 == pytest.approx(expected, rel=1e-10)


def test_a_latent_counts_only_when_positive() -> None:
    """With every pre-activation negative, nothing is active: L0 is 0 and nothing fired."""
    model = make_model()
    with torch.no_grad():
        for bias in model.b_enc:
            bias.fill_(-1e6)
    result = train_step(model, [make_batch(7, 0)], lambda *_: None)
    assert result.l0.tolist() == [0.0] * 4
    assert not result.fired.any()


def test_l0_and_fired_equal_the_dense_encoding() -> None:
    model, batch = make_model(), make_batch(30, 5)
    result = train_step(model, [batch], lambda *_: None)
    x = torch.stack([batch.values("mlp_in", s, torch.device("cpu"), torch.float64) for s in range(4)], dim=1)
    active = model.encode(x) > 0
    torch.testing.assert_close(result.l0.double(), active.sum(dim=2).double().mean(dim=0))
    assert torch.equal(result.fired, active.sum(dim=0))
