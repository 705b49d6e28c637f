"""Each optimiser against a slow reference; state that survives a restore; rounding right on average."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transcoder import SHAPE, make_model
from torch import Tensor

from clt.train import adam8
from clt.train.adam import Adam, State
from clt.train.adam8 import Adam8, dequantise_blocks, dynamic_table, quantise_blocks
from clt.train.config import OPTIMIZERS, default_lr
from clt.train.momentum import Muon, Signum, orthogonalised
from clt.train.optimizer import Optimizer, Rule
from clt.train.rounding import round_into, seeded_generator
from clt.train.transcoder import CrossLayerTranscoder


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def run_rule(rule: Rule, weight: Tensor, grads: list[Tensor], lr: float) -> tuple[Tensor, State]:
    weight, state = weight.clone(), rule.new_state(weight)
    for step, grad in enumerate(grads, 1):
        for piece in rule.pieces(weight, grad, state):
            rule.update(*piece, lr, step)
    return weight, state


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_that_of_bitsandbytes(signed: bool) -> None:
    """Value by value, as `create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)` spells it out."""
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        for j in range(parts):
            middle = 0.1 + 0.9 * (j + 0.5) / parts
            values.append(middle * 10 ** (i - 6))
            if signed:
                values.append(-middle * 10 ** (i - 6))
    assert len(values) == 256
    torch.testing.assert_close(dynamic_table(signed), torch.tensor(sorted(values)))
    assert len(dynamic_table(signed).unique()) == 256


def slow_codes(values: Tensor, signed: bool) -> tuple[list[int], list[float]]:
    """Nearest entry, block by block and value by value."""
    table = dynamic_table(signed).tolist()
    codes, absmaxes = [], []
    for start in range(0, len(values), 256):
        block = values[start : start + 256]
        absmax = block.abs().max()
        absmaxes.append(float(absmax))
        for share in (block / absmax).tolist() if absmax > 0 else [0.0] * len(block):
            nearest = min(range(256), key=lambda i: abs(table[i] - share))
            codes.append(1 if not signed and share > 0 and nearest == 0 else nearest)
    return codes, absmaxes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 256, 300, 1024])
def test_quantised_blocks_hold_the_nearest_entries(signed: bool, n: int) -> None:
    values = randn(n) * torch.logspace(-9, 3, n)
    values[n // 2 : n // 2 + 256] *= 0
    values = values if signed else values.abs()
    codes, absmax = quantise_blocks(values, signed)
    assert (codes.tolist(), absmax.tolist()) == slow_codes(values, signed)
    back = dequantise_blocks(codes, absmax, signed)
    assert ((back == 0) == (codes == int((dynamic_table(signed) == 0).nonzero()))).all()
    again = quantise_blocks(back, signed)[0]
    assert torch.equal(again, codes) or n == 1


def test_a_positive_second_moment_is_never_rounded_to_zero() -> None:
    values = torch.tensor([1.0, 1e-9, 0.0])
    codes, absmax = quantise_blocks(values, signed=False)
    back = dequantise_blocks(codes, absmax, signed=False)
    assert back[1] > 0
    assert back[2] == 0


def slow_adam8(weight: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """Adam on each block by itself; between steps its moments go through the tables."""
    blocks = list(weight.clone().split(256))
    moments = [[torch.zeros_like(b), torch.zeros_like(b)] for b in blocks]
    for step, grad in enumerate(grads, 1):
        for place, (block, g) in enumerate(zip(blocks, grad.split(256), strict=True)):
            m, v = moments[place]
            m = m.lerp(g, 1 - 0.9)
            v = (v * 0.999).addcmul(g, g, value=1 - 0.999)
            block -= lr / (1 - 0.9**step) * m / (v.sqrt() / math.sqrt(1 - 0.999**step) + 1e-8)
            for which, (moment, signed) in enumerate(((m, True), (v, False))):
                codes, (absmax,) = slow_codes(moment, signed)
                moments[place][which] = dynamic_table(signed)[torch.tensor(codes)] * absmax
    return torch.cat(blocks)


def test_adam8_equals_the_slow_one_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes exactly, weights to rounding; 700 values are three blocks, the last one short, in two slabs."""
    monkeypatch.setattr(adam8, "slab_size", lambda device: 512)
    weight, grads = randn(700), [randn(700, seed=s) for s in range(1, 5)]
    found, state = run_rule(Adam8(), weight, grads, 1e-2)
    torch.testing.assert_close(found, slow_adam8(weight, grads, 1e-2), rtol=0, atol=1e-6)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "exp_avg_code": (700,),
        "exp_avg_absmax": (3,),
        "exp_avg_sq_code": (700,),
        "exp_avg_sq_absmax": (3,),
    }


def test_adam8_stays_near_adam() -> None:
    """200 noisy steps towards a point, with gradients of sizes from 1e-6 to 1: as near to it, and to Adam."""
    size = torch.logspace(-6, 0, 64).repeat_interleave(64)
    aim, ends = randn(4096), {}
    for rule in (Adam(), Adam8()):
        weight, state = torch.zeros(4096), rule.new_state(torch.zeros(4096))
        for step in range(1, 201):
            grad = size * (weight - aim + 0.3 * randn(4096, seed=step))
            for piece in rule.pieces(weight, grad, state):
                rule.update(*piece, 0.02, step)
        ends[type(rule)] = weight
    off = float((ends[Adam] - aim).norm() / aim.norm())
    assert float((ends[Adam8] - aim).norm() / aim.norm()) < 1.1 * off
    assert float((ends[Adam8] - ends[Adam]).norm() / aim.norm()) < 0.1


def test_signum_moves_by_the_sign_of_the_average() -> None:
    weight, grads = randn(50), [randn(50, seed=s) for s in range(1, 6)]
    expected, average = weight.clone(), torch.zeros(50)
    for grad in grads:
        average = 0.95 * average + 0.05 * grad
        expected -= 0.01 * torch.sign(average)
    found, state = run_rule(Signum(), weight, grads, 0.01)
    torch.testing.assert_close(found, expected)
    assert list(state) == ["average"]


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
def test_orthogonalised_keeps_singular_vectors_and_evens_out_values(size: tuple[int, int]) -> None:
    matrix = randn(*size).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix) @ v.T
    diagonal = inside.diagonal()
    torch.testing.assert_close(inside, torch.diag(diagonal), rtol=0, atol=1e-9)
    large = values > 0.05 * values[0]
    assert diagonal[large].min() > 0.65
    assert diagonal.max() < 1.25


def test_muon_updates_each_matrix_of_a_stack_by_itself() -> None:
    weight, grads = randn(3, 12, 20), [randn(3, 12, 20, seed=s) for s in range(1, 4)]
    expected = weight.clone()
    for place in range(3):
        average = torch.zeros(12, 20)
        for grad in grads:
            average = 0.95 * average + 0.05 * grad[place]
            nesterov = 0.05 * grad[place] + 0.95 * average
            expected[place] -= 0.01 * 0.2 * 20**0.5 * orthogonalised(nesterov)
    found, _ = run_rule(Muon(), weight, grads, 0.01)
    torch.testing.assert_close(found, expected)


def gradients(model: CrossLayerTranscoder, step: int) -> list[tuple[str, int, dict[str, Tensor]]]:
    """Random, for all parameters, in the order of a step."""
    found = []
    for side, names in (("decoder", ("W_dec", "b_dec")), ("encoder", ("W_enc", "b_enc"))):
        for layer in range(SHAPE.n_layers):
            shapes = {name: getattr(model, name)[layer].shape for name in names}
            found.append((side, layer, {n: randn(*s, seed=97 * step + layer) for n, s in shapes.items()}))
    return found


def step_with(optimizer: Optimizer, model: CrossLayerTranscoder, steps: range) -> None:
    for step in steps:
        optimizer.begin(step, 1e-3)
        for side, layer, grads in gradients(model, step):
            optimizer.apply(side, layer, grads)


def model_in(dtype: torch.dtype) -> CrossLayerTranscoder:
    model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_restore_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Through a file, into a new optimiser, whatever was drawn from torch's own random numbers meanwhile."""
    monkeypatch.setattr("clt.train.optimizer.SMALL", 100)
    whole, cut = model_in(dtype), model_in(dtype)
    step_with(Optimizer(whole, name, seed=3), whole, range(5))
    first = Optimizer(cut, name, seed=3)
    step_with(first, cut, range(3))
    torch.rand(7)
    second = Optimizer(cut, name, seed=3)
    for layer in range(SHAPE.n_layers):
        save_file(first.state(layer), tmp_path / "state.safetensors")
        second.restore(layer, load_file(tmp_path / "state.safetensors"))
    step_with(second, cut, range(3, 5))
    for mine, other in zip(cut.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    kinds = {key.split(".")[1] for key in second.state(0)}
    adams = {"exp_avg", "exp_avg_sq"}
    eight = {f"{kind}_{part}" for kind in adams for part in ("code", "absmax")}
    assert (
        kinds
        == {"adam": adams, "adam8": adams | eight, "signum": {"average"}, "muon": adams | {"average"}}[name]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slabs_do_not_change_the_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("clt.train.optimizer.SMALL", 100)
    one, many = model_in(torch.float32), model_in(torch.float32)
    step_with(Optimizer(one, name), one, range(3))
    for module in ("adam", "adam8"):
        monkeypatch.setattr(f"clt.train.{module}.slab_size", lambda device: 256)
    step_with(Optimizer(many, name), many, range(3))
    for mine, other in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_clipping_is_by_the_norm_of_one_decoder_or_encoder() -> None:
    """Signum's average is the gradient times 0.05, so it shows what the rule was given."""
    model = model_in(torch.float32)
    optimizer = Optimizer(model, "signum", max_grad_norm=2.0)
    optimizer.begin(0, 0.0)
    large = {"W_dec": 3 * torch.ones_like(model.W_dec[0]), "b_dec": torch.ones_like(model.b_dec[0])}
    small = {"W_enc": torch.zeros_like(model.W_enc[0]), "b_enc": torch.full_like(model.b_enc[0], 0.1)}
    optimizer.apply("decoder", 0, {name: grad.clone() for name, grad in large.items()})
    optimizer.apply("encoder", 0, {name: grad.clone() for name, grad in small.items()})
    norm = math.sqrt(9 * model.W_dec[0].numel() + model.b_dec[0].numel())
    state = optimizer.state(0)
    torch.testing.assert_close(state["W_dec.average"], 0.05 * large["W_dec"] * 2 / norm)
    torch.testing.assert_close(state["b_dec.average"], 0.05 * large["b_dec"] * 2 / norm)
    torch.testing.assert_close(state["b_enc.average"], 0.05 * small["b_enc"])
    assert optimizer.grad_norm == pytest.approx(math.sqrt(norm**2 + 0.01 * model.b_enc[0].numel()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = model_in(torch.float32)
    optimizer = Optimizer(model, "adam")
    optimizer.begin(0, 1e-3)
    before = [p.clone() for p in model.parameters()]
    grads = {"W_dec": torch.zeros_like(model.W_dec[3]), "b_dec": torch.zeros_like(model.b_dec[3])}
    grads["W_dec"][0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"its gradient, is not finite in layer 5 .decoder."):
        optimizer.apply("decoder", 3, grads)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def rounded(values: Tensor, *key: object) -> Tensor:
    found = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(found, values, seeded_generator(values.device, *key))
    return found.float()


def test_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    values = torch.cat([randn(40), 1e-20 * randn(10)]).repeat(20_000, 1)
    found = rounded(values, 0)
    ulp = torch.exp2(torch.floor(torch.log2(values[0].abs())) - 7)
    assert ((found - values).abs() < ulp).all()
    share = (found.double() - values).mean(dim=0) / ulp
    assert share.abs().max() < 5 * 0.5 / 20_000**0.5


def test_values_that_bfloat16_has_stay() -> None:
    exact = torch.cat([randn(100).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    assert torch.equal(rounded(exact, 1), exact)
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert rounded(patterns, 1).isnan().all()


def test_noise_follows_from_its_key_alone() -> None:
    values = randn(1000)
    assert torch.equal(rounded(values, 0, 5, "W_dec", 1), rounded(values, 0, 5, "W_dec", 1))
    for other in ((1, 5, "W_dec", 1), (0, 6, "W_dec", 1), (0, 5, "W_enc", 1), (0, 5, "W_dec", 2)):
        assert not torch.equal(rounded(values, 0, 5, "W_dec", 1), rounded(values, *other))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_below_half_an_ulp_move_weights_on_average(name: str) -> None:
    """Weights of 1 with ulp 1/128, 64 steps of at most 1/1024: nearest rounding would never leave 1."""
    model = model_in(torch.bfloat16)
    for weight in model.W_enc:
        weight.data.fill_(1.0)
    exact = model_in(torch.float32)
    for weight in exact.W_enc:
        weight.data.fill_(1.0)
    means = []
    for each in (model, exact):
        optimizer = Optimizer(each, name)
        for step in range(64):
            optimizer.begin(step, 2**-10)
            for layer in range(SHAPE.n_layers):
                optimizer.apply("encoder", layer, {"W_enc": torch.ones(40, 16), "b_enc": torch.ones(40)})
        means.append(1 - float(torch.stack([w.detach().float() for w in each.W_enc]).mean()))
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert means[1] > 0.002


def test_default_rates() -> None:
    at = {name: default_lr(name, 8192) for name in OPTIMIZERS}
    root = 2**0.5
    assert at == pytest.approx(
        {"adam": 2e-4 * root, "adam8": 2e-4 * root, "signum": 5e-3 * root, "muon": 2e-3}
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's, about itself
def test_compiled_adam8_is_the_same_step() -> None:
    """Codes exactly and weights to rounding, for two lengths, by one kernel."""
    for n in (700, 5000):
        weight, grads = randn(n), [randn(n, seed=s) for s in range(1, 5)]
        expected, whole = run_rule(Adam8(), weight, grads, 1e-2)
        found, state = run_rule(Adam8(compiled=True), weight, grads, 1e-2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for name, tensor in whole.items():
            torch.testing.assert_close(state[name].float(), tensor.float(), rtol=1e-6, atol=1)
