"""Every activation and extra loss in the target-major step, against dense autograd; values and gradients."""

from dataclasses import replace

import pytest
import torch
from dense_reference import dense_loss
from tiny_transcoder import SHAPE, joined, make_batch, make_model
from torch import Tensor

from clt.train.losses import Extras
from clt.train.reader import Batch
from clt.train.shape import Shape
from clt.train.step import StepResult, train_step
from clt.train.transcoder import CrossLayerTranscoder

SHAPES = {
    "topk": SHAPE,
    "topk-by-layer": replace(SHAPE, k=(4, 1, 7, 2)),
    "groupmax": replace(SHAPE, activation="groupmax"),
    "batchtopk": replace(SHAPE, activation="batchtopk"),
    "relu": replace(SHAPE, activation="relu", k=None),
    "jumprelu": replace(SHAPE, activation="jumprelu", k=None, bandwidth=0.5),
    "jumprelu-wide": replace(SHAPE, activation="jumprelu", k=None, bandwidth=2.0),
}
TIES = [("none", False), ("source", True), ("target", False)]
DEAD = torch.rand(4, 40, generator=torch.Generator().manual_seed(3)) < 0.3
DEAD[1] = False
FULL = Extras(sparsity=0.02, auxk=0.03, dead_latents=0.01, dead=DEAD)


def step(
    model: CrossLayerTranscoder, batches: list[Batch], extras: Extras, variance: str = "cache"
) -> tuple[dict[tuple[str, int], Tensor], StepResult]:
    found: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, layer: int, grads: dict[str, Tensor]) -> None:
        assert set(grads) == set(model.names(side))
        found.update({(name, layer): grad.clone() for name, grad in grads.items()})

    return found, train_step(model, batches, keep, variance, extras)


def model_of(shape: Shape) -> CrossLayerTranscoder:
    model = make_model(shape)
    for log_threshold in model.log_threshold:  # between 0.1 and 1, as pre-activations are
        log_threshold.data.sub_(0.7)
    return model


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("tie", "skip"), TIES)
def test_gradients_equal_dense_autograd(name: str, tie: str, skip: bool) -> None:
    """Each gradient of the joint loss, to 1e-10 in float64; and each loss."""
    model, batch = model_of(replace(SHAPES[name], tie=tie, skip=skip)), make_batch(33, 1)
    extras = FULL if "relu" in name else FULL._replace(sparsity=0.0)
    found, result = step(model, [batch], extras)
    expected = dense_loss(model, batch, "cache", extras)
    torch.stack(list(expected.values())).sum().backward()
    assert float(result.loss) == pytest.approx(sum(float(v.detach()) for v in expected.values()), rel=1e-12)
    for loss, value in result.extra.items():
        assert float(value) == pytest.approx(float(expected[loss].detach()), rel=1e-12), loss
        assert value > 0
    assert len(found) == len(list(model.parameters()))
    for (parameter, layer), grad in found.items():
        reference = getattr(model, parameter)[layer].grad
        assert reference.abs().max() > 0, (parameter, layer)
        assert (grad - reference).abs().max() < 1e-10 * reference.abs().max(), (parameter, layer)


@pytest.mark.parametrize("loss", ["sparsity", "auxk", "dead_latents"])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "batchtopk"])
def test_each_extra_loss_alone(name: str, loss: str) -> None:
    """None hides behind another, and each changes the encoder's gradient."""
    if name == "batchtopk" and loss == "sparsity":
        pytest.skip("batchtopk is sparse by k")
    model, batch = model_of(SHAPES[name]), make_batch(20, 2)
    extras = Extras(dead=DEAD)._replace(**{loss: 0.05})
    found, result = step(model, [batch], extras)
    without, _ = step(model, [batch], Extras())
    sum(dense_loss(model, batch, "cache", extras).values()).backward()
    assert set(result.extra) == {loss}
    for (parameter, layer), grad in found.items():
        reference = getattr(model, parameter)[layer].grad
        assert (grad - reference).abs().max() < 1e-10 * reference.abs().max(), (parameter, layer)
    for parameter in ("W_enc", "W_dec"):
        assert not torch.allclose(found[parameter, 0], without[parameter, 0], rtol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("variance", ["cache", "batch"])
def test_micro_batches_equal_one_batch(name: str, variance: str) -> None:
    """All gradients, losses, L0 and running thresholds, batchtopk's competition included."""
    parts = [make_batch(n, n) for n in (8, 5, 19)]
    extras = FULL if "relu" in name else FULL._replace(sparsity=0.0)
    one, many = model_of(SHAPES[name]), model_of(SHAPES[name])
    expected, whole = step(one, [joined(parts)], extras, variance)
    found, split = step(many, parts, extras, variance)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-12)
    torch.testing.assert_close(split.l0, whole.l0)
    assert torch.equal(split.fired, whole.fired)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-14)
    if name == "batchtopk":
        torch.testing.assert_close(many.threshold, one.threshold)


def test_a_micro_batch_may_take_more_than_its_share_of_batchtopk() -> None:
    """Tokens with large pre-activations take latents from the others, whichever micro-batch they are in."""
    shape = SHAPES["batchtopk"]
    model, parts = model_of(shape), [make_batch(6, 1), make_batch(6, 2)]
    loud = parts[1].rows.codes["mlp_in"]
    loud[:] = ((loud & 0x8000) | 0x4120 | (loud & 0x7F)).astype(loud.dtype)  # all between 8 and 16
    for order in (parts, parts[::-1]):
        _, result = step(model, order, Extras())
        codes = [model.activation(0).infer(model.pre_activations(x, 0)) for x in _inputs(model, order)]
        counts = {id(part): int((c.values > 0).sum()) for part, c in zip(order, codes, strict=True)}
        assert result.l0.tolist() == pytest.approx([4.0] * 4)
        assert counts[id(parts[1])] > 2 * counts[id(parts[0])]


def _inputs(model: CrossLayerTranscoder, parts: list[Batch]) -> list[Tensor]:
    cpu = torch.device("cpu")
    return [model.inputs.apply_to(p.values("mlp_in", 0, cpu, torch.float64), 0) for p in parts]


def test_batchtopk_infers_with_its_running_threshold() -> None:
    """The first step sets it to the smallest value kept, later ones move it by a hundredth."""
    model, batches = model_of(SHAPES["batchtopk"]), [make_batch(50, 1), make_batch(50, 2)]
    smallest = []
    for batch in batches:
        pre = model.pre_activations(_inputs(model, [batch])[0], 0)
        smallest.append(float(pre.detach().flatten().topk(200).values[-1]))
        step(model, [batch], Extras())
    assert float(model.threshold[0]) == pytest.approx(0.99 * smallest[0] + 0.01 * smallest[1], rel=1e-12)
    x = torch.stack(
        [batches[0].values("mlp_in", s, torch.device("cpu"), torch.float64) for s in range(4)], dim=1
    )
    alone = torch.cat([model.encode(x[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(alone, model.encode(x))  # no token depends on its batch
    assert float(alone[alone > 0].min().detach()) >= float(model.threshold.min())
    assert float((alone[:, 0] > 0).sum()) == pytest.approx(200, rel=0.05)


def test_jumprelu_is_zero_up_to_its_threshold() -> None:
    model = model_of(SHAPES["jumprelu"])
    codes = model.encode(torch.randn(60, 4, 16, dtype=torch.float64)).detach()
    for s in range(4):
        active = codes[:, s] > 0
        assert (codes[:, s] >= model.theta(s))[active].all()
        assert 0 < active.double().mean() < 1


def test_k_of_the_step_wins_over_the_transcoder() -> None:
    model = model_of(SHAPES["topk"])
    _, result = step(model, [make_batch(30, 1)], Extras(k=(9, 5, 4, 1)))
    assert (result.l0 <= torch.tensor([9.0, 5.0, 4.0, 1.0])).all()
    assert result.l0[0] > 4


def test_auxk_reaches_the_encoder_of_latents_that_never_win() -> None:
    """Without it their encoder rows and biases get no gradient at all; with it they do."""
    model, batch = model_of(SHAPES["topk"]), make_batch(64, 1)
    with torch.no_grad():
        model.W_enc[0][:8] *= 1e-6
        model.b_enc[0][:8] = 1e-3  # positive, and smaller than k others for every token
    dead = torch.zeros(4, 40, dtype=torch.bool)
    dead[0, :8] = True
    without, result = step(model, [batch], Extras(dead=dead))
    found, _ = step(model, [batch], Extras(dead=dead, auxk=1 / 32))
    assert not result.fired[0, :8].any()
    for name in ("W_enc", "b_enc"):
        assert not without[name, 0][:8].any()
        assert (found[name, 0][:8] != 0).all()
        assert torch.equal(found[name, 0][8:], without[name, 0][8:])


@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_a_dead_latent_comes_back(name: str) -> None:
    """Latents whose bias is far too low fire again under the penalty, and without it they do not."""
    shape = replace(SHAPES[name], layers=(0,), n_targets=1)
    dead = torch.zeros(1, 40, dtype=torch.bool)
    dead[0, :8] = True
    fired = {}
    for weight in (0.0, 0.5):
        model, batch = model_of(shape), make_batch(64, 1, shape)
        model.b_enc[0].data[:8] = -6.0
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(60):
            found, result = step(model, [batch], Extras(dead=dead, dead_latents=weight))
            for (parameter, layer), grad in found.items():
                getattr(model, parameter)[layer].grad = grad
            optimizer.step()
        fired[weight] = result.fired[0, :8]
    assert not fired[0.0].any()
    assert fired[0.5].any()
