"""The target-major step against autograd on a naive dense transcoder."""

import numpy as np
import pytest
import torch
from tiny_transcoder import SHAPE, make_batch, make_model
from torch import Tensor

from clt.cache_format.layout import SITES
from clt.train.optimizer import LayerwiseAdam
from clt.train.reader import Batch
from clt.train.source import Rows
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder, Shape


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
            predicted = predicted + activations[s] @ model.W_dec[t][place]
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


@pytest.mark.parametrize("variance", ["cache", "batch"])
@pytest.mark.parametrize("n_targets", [1, 3, 99])
def test_gradients_equal_autograd(variance: str, n_targets: int) -> None:
    """Every gradient of the joint loss, to 1e-10 in float64."""
    shape = Shape(SHAPE.layers, SHAPE.d_model, SHAPE.n_latents, SHAPE.k, n_targets)
    model, batch = make_model(shape), make_batch(33, 1, shape)
    found, loss = gradients(model, [batch], variance)
    expected = naive_loss(model, batch, variance)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert len(found) == 4 * shape.n_layers
    for (name, layer), grad in found.items():
        reference = getattr(model, name)[layer].grad
        assert reference.abs().max() > 0, (name, layer)
        assert (grad - reference).abs().max() < 1e-10 * reference.abs().max(), (name, layer)


def test_micro_batches_add_up() -> None:
    """The step of three micro-batches is the step of one batch that holds their tokens."""
    model, parts = make_model(), [make_batch(n, n) for n in (8, 5, 19)]
    whole = Batch(
        Rows(
            {site: np.concatenate([p.rows.codes[site] for p in parts], axis=1) for site in SITES},
            {site: np.concatenate([p.rows.scales[site] for p in parts], axis=1) for site in SITES},
        ),
        np.arange(32),
    )
    for variance in ("cache", "batch"):
        split, loss = gradients(model, parts, variance)
        joint, whole_loss = gradients(model, [whole], variance)
        assert float(loss) == pytest.approx(float(whole_loss), rel=1e-12)
        for key, grad in joint.items():
            torch.testing.assert_close(split[key], grad, rtol=1e-9, atol=1e-14)


def test_step_equals_adam_on_the_joint_loss() -> None:
    """Ten updates layer by layer are ten updates of torch's Adam on all parameters at once."""
    ours, theirs = make_model(), make_model()
    optimizer = LayerwiseAdam(ours)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for number in range(10):
        batch = make_batch(20, number)
        optimizer.begin(1e-2)
        train_step(ours, [batch], optimizer.apply)
        reference.zero_grad()
        naive_loss(theirs, batch, "cache").backward()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def test_gradient_norm_is_that_of_all_gradients() -> None:
    model, batch = make_model(), make_batch(12, 3)
    optimizer = LayerwiseAdam(model)
    optimizer.begin(1e-3)
    found, _ = gradients(model, [batch])
    train_step(model, [batch], optimizer.apply)
    expected = sum(float(grad.square().sum()) for grad in found.values())
    assert optimizer.square_norm == pytest.approx(expected, rel=1e-10)


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
